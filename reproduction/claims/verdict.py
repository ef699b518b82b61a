"""The rules by which our figures judge the paper's."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

from cramlab.report.intervals import Interval

TOLERATED = 0.1  # distance from our interval that is tolerated, as a share of the claimed effect
TELLING = 0.5  # widest interval that decides, as a share of the claimed effect


class Verdict(enum.StrEnum):
    """Verdict on a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "**not reproduced**"
    UNDECIDED = "undecided"
    NOT_TESTABLE = "not testable here"
    NOT_RUN = "not run yet"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the paper.

    Attributes:
        value: the figure.
        without: value of the quantity if the claim were false; their distance is the claimed effect.
    """

    value: float
    without: float

    @property
    def claimed(self) -> float:
        """The claimed effect, from which every tolerance follows."""
        return abs(self.value - self.without)


def judge(ours: Interval | None, paper: Figure) -> Verdict:
    """Whether our interval, widened by a tenth of the claimed effect, holds the paper's figure.

    An interval that does and is wider than half of the effect is undecided, and so is a mean without interval.
    """
    if ours is None:
        return Verdict.NOT_RUN
    if ours.low is None or ours.high is None:
        return Verdict.UNDECIDED
    margin = TOLERATED * paper.claimed
    if not ours.low - margin <= paper.value <= ours.high + margin:
        return Verdict.NOT_REPRODUCED
    return Verdict.REPRODUCED if ours.high - ours.low <= TELLING * paper.claimed else Verdict.UNDECIDED


def at_least(ours: Interval | None, level: float) -> Verdict:
    """Whether our whole interval is at or above a level (reproduced) or below it (not reproduced); else undecided."""
    if ours is None:
        return Verdict.NOT_RUN
    if ours.low is None or ours.high is None:
        return Verdict.UNDECIDED
    if ours.low >= level:
        return Verdict.REPRODUCED
    return Verdict.NOT_REPRODUCED if ours.high < level else Verdict.UNDECIDED


def at_most(ours: Interval | None, level: float) -> Verdict:
    """Whether our whole interval is at or below a level; see `at_least`."""
    if ours is None:
        return Verdict.NOT_RUN
    return at_least(ours.negative(), -level)


def most(hits: int, n: int) -> Verdict:
    """Whether more than half of the runs show something, by the exact 95% interval of their share."""
    return at_least(run_share(hits, n), 0.5)


def run_share(hits: int, n: int) -> Interval | None:
    """Share of `n` runs with Clopper and Pearson's exact 95% interval; None without runs."""
    if not n:
        return None
    ends = stats.binomtest(hits, n).proportion_ci(method="exact")
    return Interval(mean=hits / n, low=float(ends.low), high=float(ends.high))


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim in several parts: refuted if one is, undecided if one is; not run without parts."""
    found: Sequence[Verdict] = list(verdicts)
    for verdict in (Verdict.NOT_REPRODUCED, Verdict.NOT_TESTABLE, Verdict.NOT_RUN, Verdict.UNDECIDED):
        if verdict in found:
            return verdict
    return Verdict.REPRODUCED if found else Verdict.NOT_RUN
