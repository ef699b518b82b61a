"""Results as tables: means over seeds, with intervals."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cramlab.config import differing, to_dict
from cramlab.objective import LossConfig
from cramlab.report.intervals import Interval, seed_interval, share_interval
from cramlab.terminal import plain
from cramlab.training.run import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mixer at one size, over its seeds.

    `dynamics_ratio` is the error over that of `transformer` with the same seed, which saw the same test sequences and
    so the same noise; the mean over the seeds that both have, None without any.
    """

    experiment: str
    size: str
    mixer: str
    seeds: tuple[int, ...]
    recurring: Interval
    novel: Interval
    dynamics_mse: Interval
    dynamics_ratio: float | None
    attention_frac: Interval
    reads_frac: Interval
    oracle_attention_frac: float
    train_reads_frac: Interval
    n_parameters: int
    minutes: Interval


def summarise(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Finished records by experiment, size, mixer and config; only the seed may differ within a row.

    The same run found twice counts once. Where one mixer comes with several configs, its rows name what differs.
    """
    groups: dict[tuple[str, str, str], dict[str, dict[int, dict[str, Any]]]] = {}
    for record in found:
        if record["status"] == "finished" and record["metrics"]["test"] is not None:  # tuning has none
            configs = groups.setdefault((record["experiment"], record["size"], record["mixer"]), {})
            configs.setdefault(_seedless(record), {})[record["seed"]] = record
    rows = []
    control = {
        (experiment, size): {seed: record["metrics"]["test"]["dynamics_mse"] for seed, record in seeds.items()}
        for (experiment, size, mixer), configs in groups.items()
        for seeds in configs.values()
        if mixer == "transformer"
    }
    for (experiment, size, mixer), configs in sorted(groups.items()):
        first = json.loads(next(iter(configs)))
        names = {name for text in configs for name in differing(json.loads(text), first)}  # none for one config
        for text, seeds in configs.items():
            label = mixer + "".join(f", {name}={_at(json.loads(text), name)}" for name in sorted(names))
            row = _row(experiment, size, label, [seeds[seed] for seed in sorted(seeds)])
            full = control.get((experiment, size), {})
            errors = {s: r["metrics"]["test"]["dynamics_mse"] for s, r in seeds.items()}
            ratios = [errors[s] / full[s] for s in seeds if errors[s] is not None and full.get(s)]
            rows.append(dataclasses.replace(row, dynamics_ratio=float(np.mean(ratios)) if ratios else None))
    return rows


def _seedless(record: dict[str, Any]) -> str:
    """The config without its seed, as text. A field that is younger than the record has its default, as it had then."""
    training = to_dict(TrainingConfig()) | record["config"]["training"]
    training["loss"] = to_dict(LossConfig()) | training["loss"]
    config = {name: value for name, value in record["config"].items() if name != "seed"}
    return json.dumps(config | {"training": training}, sort_keys=True)


def _at(config: Any, path: str) -> Any:
    """The value at a dotted path; None where there is no such field."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _row(experiment: str, size: str, mixer: str, group: list[dict[str, Any]]) -> Row:
    tests = [record["metrics"]["test"] for record in group]

    def over_seeds(name: str) -> Interval:
        return seed_interval([test[name] for test in tests if test[name] is not None] or [math.nan])

    def share(name: str, count: str) -> Interval:
        """Interval over seeds; for a single seed, over its queries or tokens."""
        value, n = tests[0][name], tests[0][count]
        return share_interval(value, n) if len(tests) == 1 and n else over_seeds(name).within(0.0, 1.0)

    return Row(
        experiment=experiment,
        size=size,
        mixer=mixer,
        seeds=tuple(sorted(record["seed"] for record in group)),
        recurring=share("retrieval_acc_recurring", "n_queries_recurring"),
        novel=share("retrieval_acc_novel", "n_queries_novel"),
        dynamics_mse=over_seeds("dynamics_mse"),
        dynamics_ratio=None,
        attention_frac=share("attention_frac", "n_tokens"),
        reads_frac=share("reads_frac", "n_tokens"),
        oracle_attention_frac=float(np.mean([record["oracle"]["attention_frac"] for record in group])),
        train_reads_frac=seed_interval([record["train_reads_frac"] for record in group]),
        n_parameters=group[0]["n_parameters"] or 0,
        minutes=seed_interval([record["elapsed_s"] / 60 for record in group]),
    )


COLUMNS = (
    "experiment", "size", "mixer", "seeds", "retrieval, recurring", "retrieval, novel", "dynamics MSE",
    "/ transformer", "attention_frac", "/ oracle", "reads_frac", "training reads", "parameters",
    "minutes",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """The row's text, in the order of `COLUMNS`."""
    oracle = row.oracle_attention_frac
    return (
        row.experiment,
        row.size,
        row.mixer,
        ", ".join(str(seed) for seed in row.seeds),
        row.recurring.format(4),
        row.novel.format(4),
        row.dynamics_mse.format(5),
        "-" if row.dynamics_ratio is None else f"{row.dynamics_ratio:.3f}",
        row.attention_frac.format(5),
        f"{row.attention_frac.mean / oracle:.3f}" if oracle else "-",
        row.reads_frac.format(5),
        row.train_reads_frac.format(3),
        f"{row.n_parameters:,}",
        f"{row.minutes.mean:.1f}",
    )


def results_table(found: Iterable[dict[str, Any]]) -> Table:
    """Table for the terminal, with one column a mixer, so that it fits."""
    columns = [[Text(cell) for cell in cells(row)] for row in summarise(plain(list(found)))]
    table = Table(title="test split, 95% intervals", show_header=False)
    for name, *values in zip(COLUMNS, *columns, strict=True):
        table.add_row(name, *values, end_section=name == "seeds")
    return table


def processor(record: dict[str, Any]) -> str:
    """The processor or accelerator that a record was made on."""
    hardware = record["hardware"]
    return hardware["accelerator"] or hardware["processor"] or hardware["machine"]


def origin(record: dict[str, Any]) -> str:
    """Date, hardware, code and versions of a record in one line."""
    hardware, versions = record["hardware"], record["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{record['date']}, {processor(record)}, {hardware['n_threads']} of {hardware['n_cores']} cores a run; "
        f"code {record['revision'] or 'without a checkout'}; {libraries}"
    )
