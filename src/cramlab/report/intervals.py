"""Computes and formats 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95% interval.

    Attributes:
        mean: the estimate.
        low: lower end; None if no interval can be computed.
        high: upper end; None with `low`.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    def within(self, least: float, most: float) -> Interval:
        """The interval cut at the bounds of the quantity."""
        if self.low is None or self.high is None:
            return self
        return Interval(mean=self.mean, low=max(self.low, least), high=min(self.high, most))

    def negative(self) -> Interval:
        """The interval of the quantity with its sign changed."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Interval(mean=-self.mean, low=low, high=high)

    def format(self, digits: int) -> str:
        """`0.998 [0.996, 1.000]`, or the mean alone."""
        return estimate((self.mean, self.low, self.high), f".{digits}f")


def estimate(values: Sequence[float | None], form: str = ".3f") -> str:
    """`value [low, high]` in a number format; the value alone without an interval, "-" without a value."""
    value, low, high = (None if v is None else f"{v:{form}}" for v in values)
    if value is None:
        return "-"
    return value if low is None or high is None else f"{value} [{low}, {high}]"


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval; a mean alone for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean=mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def share_interval(share: float, n: int) -> Interval:
    """A share of n trials with Wilson's interval: the uncertainty from the finite test set of one seed."""
    result = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return Interval(mean=share, low=float(result.low), high=float(result.high))
