"""What claims are judged by, and the rules of judging."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cramlab.report.tables import Interval, seed_interval, share_interval


class Verdict(enum.StrEnum):
    """How a claim ends."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "**not reproduced**"
    UNDECIDED = "undecided"
    NOT_TESTABLE = "not testable here"
    NOT_RUN = "not run yet"


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """One figure of the paper.

    Attributes:
        claim: "C1" to "C8".
        what: is claimed.
        paper: its figure.
        ours: our figure, with its interval and how many runs it rests on.
        command: regenerates our records.
        verdict: by the rule of `judge`, or stated where the row is made.
    """

    claim: str
    what: str
    paper: str
    ours: str
    command: str
    verdict: Verdict

    def cells(self) -> tuple[str, ...]:
        """In the order of `COLUMNS`."""
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
        """The runs of an experiment, at one size and of one mixer if wanted."""
        return [
            run
            for run in self.runs
            if run["experiment"] == experiment
            and (size is None or run["size"] == size)
            and (mixer is None or run["mixer"] == mixer)
        ]


def judge(ours: Interval | None, paper: float, tolerance: float) -> Verdict:
    """Reproduced when the paper's figure lies within the tolerance of our mean or in our interval.

    An interval wider than half of the paper's figure holds too much to decide anything.
    """
    if ours is None:
        return Verdict.NOT_RUN
    if abs(ours.mean - paper) <= tolerance:
        return Verdict.REPRODUCED
    if ours.low is None or ours.high is None or not ours.low <= paper <= ours.high:
        return Verdict.NOT_REPRODUCED
    return Verdict.REPRODUCED if ours.high - ours.low <= abs(paper) / 2 else Verdict.UNDECIDED


def over_seeds(runs: Iterable[dict[str, Any]], name: str, count: str | None = None) -> Interval | None:
    """A test metric over seeds; for one run Wilson's interval over its `count`. None without runs that know it."""
    tests = [run["metrics"]["test"] for run in runs if run["metrics"]["test"]]
    tests = [test for test in tests if test.get(name) is not None]
    if not tests:
        return None
    if len(tests) == 1 and count is not None:
        return share_interval(tests[0][name], tests[0][count])
    return seed_interval([test[name] for test in tests]).within(0.0, 1.0)


def shown(ours: Interval | None, digits: int, n_runs: int) -> str:
    """`0.998 [0.996, 1.000], 3 runs`."""
    if ours is None:
        return "-"
    return f"{ours.format(digits)}, {n_runs} run{'' if n_runs == 1 else 's'}"


def estimate(values: Sequence[float | None], digits: int = 2) -> str:
    """`value [low, high]` of a figure from an audit."""
    value, low, high = ("-" if v is None else f"{v:.{digits}f}" for v in values)
    return f"{value} [{low}, {high}]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
