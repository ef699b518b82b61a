"""Copies the records of language models into results/language in short form, and renews their page and goals.

python -m reproduction.collect_language code=runs/language/code english=runs/language/english
python -m reproduction.collect_language              # page, figures and goals alone, from results/language
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.files import write_json
from reproduction import language_goals
from reproduction.pages import language

ROW = ("step", "n_tokens", "nats_per_token", "attention_frac", "gain", "encoding_ended_at")


def collect(runs: Path, results: Path) -> list[Path]:
    """Copies every record of a folder of runs, and of its tuning; returns the new files."""
    written = []
    for path in sorted(runs.glob("*.json")) + sorted(runs.glob("tuning/*.json")):
        written.append(results / path.relative_to(runs))
        write_json(written[-1], short(records.read_json(path)))
    return written


def short(record: dict[str, Any]) -> dict[str, Any]:
    """A record with what page and goals read, and numbers rounded to six digits.

    Reads by layer are kept over all tokens alone, and slices by how often an n-gram was seen for models whose tokens
    choose; a tuning run keeps its last evaluation.
    """
    if record["kind"] != "text":
        return _rounded(record)
    series = [{name: row[name] for name in ROW if name in row} for row in record["series"]]
    if "test" not in record:
        return _rounded(record | {"series": series[-1:]})
    chooses = "encoding_ended_at" in series[-1]
    left_out = {"nats_by_window"} | (set() if chooses else {"by_count", "by_count_and_nats"})
    test = {name: part for name, part in record["test"].items() if name not in left_out}
    kept = {"all": test["all"]}
    return _rounded(record | {"series": series, "test": _without_layers(test) | kept})


def _without_layers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_layers(part) for name, part in value.items() if name != "reads_frac_by_layer"}
    return [_without_layers(part) for part in value] if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(given: Sequence[str] | None = None) -> None:
    """Collects what is given as CORPUS=FOLDER, then renews goals, page and figures."""
    for pair in sys.argv[1:] if given is None else given:
        corpus, _, runs = pair.partition("=")
        if corpus not in language.CORPORA or not Path(runs).is_dir():
            names = " or ".join(language.CORPORA)
            raise SystemExit(f"{pair}: give CORPUS=FOLDER, with {names} and a folder of runs")
        for new in collect(Path(runs), language.RESULTS / corpus):
            print(new)
    print(language_goals.renew())
    language.renew_page()


if __name__ == "__main__":
    main()
