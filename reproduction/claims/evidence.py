"""The evidence by which claims are judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cramlab.config import differing, to_dict
from cramlab.report.intervals import Interval, seed_interval
from cramlab.tasks.srcd import SRCDConfig
from reproduction.claims.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """One figure of the paper.

    Attributes:
        claim: "C1" to "C8".
        what: the claim.
        paper: the paper's figure.
        ours: our figure, with its interval and its number of runs.
        command: command that regenerates our records.
        verdict: by a rule of `reproduction.claims.verdict`, or stated where the row is made.
    """

    claim: str
    what: str
    paper: str
    ours: str
    command: str
    verdict: Verdict

    def cells(self) -> tuple[str, ...]:
        """Text of the cells, in the order of `COLUMNS`."""
        return (self.claim, self.what, self.paper, self.ours, f"`{self.command}`" if self.command else "", self.verdict)


COLUMNS = ("", "claim", "paper", "ours", "command", "verdict")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All documents that claims rest on; empty where nothing has been run.

    Attributes:
        runs: finished run records with a look at the test split.
        audits: audit documents, by model.
        over_training: the audit over training; None: not there.
        irregular: documents of the experiment on irregular series.
    """

    runs: Sequence[dict[str, Any]] = ()
    audits: dict[str, dict[str, Any]] = field(default_factory=dict)
    over_training: dict[str, Any] | None = None
    irregular: Sequence[dict[str, Any]] = ()

    def of(self, experiment: str, size: str | None = None, mixer: str | None = None) -> list[dict[str, Any]]:
        """The runs of an experiment; at one size and of one mixer if these are given."""
        return [
            run
            for run in self.runs
            if run["experiment"] == experiment
            and (size is None or run["size"] == size)
            and (mixer is None or run["mixer"] == mixer)
        ]


def standard(run: dict[str, Any]) -> bool:
    """Whether a run's task is the paper's, SRCD with its defaults, at any length of the sequences."""
    task = to_dict(SRCDConfig())
    return not differing(task | run["config"]["task"] | {"seq_len": task["seq_len"]}, task)


def commands(runs: Iterable[dict[str, Any]]) -> str:
    """Commands that regenerate the records of runs, one for each experiment, size and mixer."""
    found = {(run["experiment"], run["mixer"], run["size"]) for run in runs}
    return " && ".join(
        f"cramlab run {experiment}/{mixer} --size {size} --out runs/results/{experiment}"
        for experiment, mixer, size in sorted(found)
    )


def over_seeds(runs: Iterable[dict[str, Any]], name: str) -> Interval | None:
    """A test metric over seeds; a mean alone for one run; None if no run has it."""
    tests = [run["metrics"]["test"] for run in runs if run["metrics"]["test"]]
    values = [test[name] for test in tests if test.get(name) is not None]
    return seed_interval(values).within(0.0, 1.0) if values else None


def shown(ours: Interval | None, digits: int, n_runs: int) -> str:
    """`0.998 [0.996, 1.000], 3 runs`."""
    if ours is None:
        return "-"
    return f"{ours.format(digits)}, {n_runs} run{'' if n_runs == 1 else 's'}"


def interval_of(values: Sequence[float]) -> Interval:
    """An audit's estimate: value, and the ends of its 95% interval."""
    return Interval(mean=values[0], low=values[1], high=values[2])
