"""Makes results/leaderboard.json and docs/leaderboard.md from the records: `python -m reproduction.leaderboard`.

A line is a task, a mixer and the records of its seeds. Lines of models trained anywhere come from results/scores, where
`cramlab score` writes them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cramlab import records
from cramlab.errors import CramlabError
from cramlab.files import write_json
from cramlab.report.intervals import estimate, seed_interval
from cramlab.training.load import run_config
from reproduction import goals, leaderboard_goals
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "leaderboard.md"
PATH = RESULTS / "leaderboard.json"
KIND = "leaderboard"
RUNS = ("srcd_table", "srcd_deep", "mqar")  # folders of results/ with one folder for each size
REACHED = 0.95  # validation accuracy from which a task counts as learned
_UNITS = ("", "k", "M", "G")


def found(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All lines, best first within each task."""
    return [*_runs(results), *_irregular(results), *_scores(results)]


def _line(task: str, mixer: str, paths: Sequence[Path], results: Path, **fields: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("measure", "accuracy", "interval", "reads_frac", "reads_over_optimum", "tokens_to_reach", "state_bytes")
    )
    listed = [str(path.relative_to(results.parent)) for path in paths]
    return {"task": task, "mixer": mixer} | empty | fields | {"n_seeds": len(paths), "record": listed}


def _runs(results: Path) -> list[dict[str, Any]]:
    """Lines of training runs, those with the tuning seed left out."""
    grouped: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for folder in RUNS:
        for path in sorted((results / folder).rglob("*.json")):
            record = records.read(path)
            if record["metrics"]["test"] is not None and not record.get("variant"):
                task = f"{record['experiment']}, {record['size']}"
                grouped.setdefault((task, record["mixer"]), []).append((path, record))
    made = [_of_runs(task, mixer, group, results) for (task, mixer), group in grouped.items()]
    order = list(dict.fromkeys(line["task"] for line in made))
    return sorted(made, key=lambda line: (order.index(line["task"]), -line["accuracy"], line["reads_frac"]))


def _of_runs(task: str, mixer: str, group: list[tuple[Path, dict[str, Any]]], results: Path) -> dict[str, Any]:
    tests = [record["metrics"]["test"] for _, record in group]
    least = float(np.mean([record["oracle"]["attention_frac"] for _, record in group]))
    reads = float(np.mean([test["reads_frac"] for test in tests]))
    accuracy = [test["retrieval_acc"] for test in tests]
    reached = [_tokens_to_reach(record) for _, record in group]
    return _line(
        task, mixer, [path for path, _ in group], results,
        measure="accuracy", **_mean(accuracy), reads_frac=_rounded(reads), reads_over_optimum=_over(reads, least),
        tokens_to_reach=None if None in reached else round(float(np.mean(np.array(reached, dtype=float)))),
        state_bytes=_state_bytes(json.dumps(group[0][1]["config"])),
    )  # fmt: skip


def _tokens_to_reach(record: dict[str, Any]) -> int | None:
    """Tokens of training at the first validation from `REACHED` on; None if there was none."""
    for row in record["series"]:
        if row["validation"] is not None and (row["validation"]["retrieval_acc"] or 0) >= REACHED:
            return row["n_tokens"]
    return None


@functools.cache
def _state_bytes(config: str) -> int | None:
    """Bytes that the layers carry from token to token in decoding, at the task's length; None: unknown mixer."""
    try:
        run = run_config(json.loads(config))
    except CramlabError:
        return None
    mixers = [run.model.mixer_of(layer) for layer in range(run.model.n_layers)]
    return sum(mixer.build(run.model.d_model).cost(run.task.seq_len).state_bytes for mixer in mixers)


def _irregular(results: Path) -> list[dict[str, Any]]:
    """Lines of models that were trained from scratch on irregular series."""
    grouped: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for path in sorted((results / "irregular").rglob("*.json")):
        document = records.read_json(path)
        if "way" not in document:
            grouped.setdefault((document["data"]["name"], document["model"]), []).append((path, document))
    made = []
    for (task, mixer), group in grouped.items():
        tests = [document["test"] for _, document in group]
        reads = [test.get("reads_frac") for test in tests]
        made.append(
            _line(
                task, mixer, [path for path, _ in group], results, measure="AUC",
                **_mean([test["auc"] for test in tests]),
                reads_frac=None if None in reads else _rounded(float(np.mean(np.array(reads, dtype=float)))),
            )
        )  # fmt: skip
    return sorted(made, key=lambda line: (line["task"], -line["accuracy"]))


def _scores(results: Path) -> list[dict[str, Any]]:
    """Lines that `cramlab score` wrote."""
    made = []
    for path in sorted((results / "scores").rglob("*.json")):
        document = records.read_json(path)
        metrics, reads = document["metrics"], document["metrics"]["attention_frac"]
        if metrics["retrieval_acc"] is None:  # nothing is asked, so nothing is ranked
            continue
        made.append(
            _line(
                f"{document['task']}, exported", document["name"], [path], results, measure="accuracy",
                accuracy=_rounded(metrics["retrieval_acc"]), reads_frac=reads,
                reads_over_optimum=_over(reads, document["oracle"]["attention_frac"]),
                tokens_to_reach=metrics["n_train_tokens"], state_bytes=metrics["state_bytes"],
            )
        )  # fmt: skip
    return made


def _mean(values: list[float]) -> dict[str, Any]:
    got = seed_interval(values).within(0.0, 1.0)
    interval = None if got.low is None or got.high is None else [_rounded(got.low), _rounded(got.high)]
    return {"accuracy": _rounded(got.mean), "interval": interval}


def _over(reads: float | None, least: float) -> float | None:
    """Reads over the least; None where they are unknown, or where nothing need be read."""
    return _rounded(reads / least) if reads is not None and least else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def sections(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The text between each pair of marks of the page."""
    rows = [
        (
            line["task"], f"`{line['mixer']}`", str(line["n_seeds"]),
            estimate((line["accuracy"], *(line["interval"] or (None, None))), ".4g"),
            _shown(line["reads_frac"]), _shown(line["reads_over_optimum"]), _short(line["tokens_to_reach"]),
            _short(line["state_bytes"]),
        )
        for line in lines
    ]  # fmt: skip
    columns = ("task", "mixer", "seeds", "accuracy (irregular: AUC)", "share of tokens that read", "reads / optimum",
               "tokens to 0.95", "bytes of state")  # fmt: skip
    return {"lines": table(columns, rows), "goals": goals.render(leaderboard_goals.TOPIC)}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    power = 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{_UNITS[power]}"


def document() -> dict[str, Any]:
    """The document in results/leaderboard.json."""
    return {"kind": KIND, "schema_version": records.SCHEMA_VERSION, "lines": found()}


def main() -> None:
    """Renews goals, document and page."""
    leaderboard_goals.renew()
    made = document()
    write_json(PATH, made)
    renew(PAGE, sections(made["lines"]))


if __name__ == "__main__":
    main()
