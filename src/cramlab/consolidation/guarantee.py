"""Risk control over documents: p-values for "the expected increase is above the promised one".

Source: Learn then Test (Angelopoulos et al. 2021) for the procedure and the Hoeffding-Bentkus p-value; betting as in
Waudby-Smith and Ramdas (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import binom

from cramlab.config import ConfigError, Positive, checked

Floats = NDArray[np.float64]


def hoeffding_bentkus_p(losses: Floats, risk: float) -> float:
    """P-value of "the mean of losses in [0, 1] is above `risk`"; valid for any number of independent losses (N,)."""
    n, mean = len(losses), min(float(losses.mean()), risk)
    divergence = sum(
        a * math.log(a / b) for a, b in ((mean, risk), (1 - mean, 1 - risk)) if a > 0
    )  # of two coins, nats
    bentkus = math.e * float(binom.cdf(math.ceil(n * float(losses.mean())), n, risk))
    return min(1.0, math.exp(-n * divergence), bentkus)


def betting_p(losses: Floats, risk: float, delta: float) -> float:
    """As `hoeffding_bentkus_p`, but it profits from losses that vary little, as those of documents do.

    A gambler bets before each loss (N,) that it will be below `risk`. If the mean is above, no rule of betting makes
    the expected capital grow, so by Ville's inequality the largest capital ever held is a p-value's inverse.

    Args:
        losses: independent, in [0, 1], in an order that does not depend on them.
        risk: between 0 and 1.
        delta: the level at which the bets are aimed; any is valid.
    """
    n = len(losses)
    capital = best = 0.0  # logarithms
    total, squares = 0.5, 0.25
    for i, loss in enumerate(losses.tolist()):
        variance = squares / (i + 1)
        stake = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 0.95 / (1 - risk))
        capital += math.log1p(-stake * (loss - risk))
        best = max(best, capital)
        total += loss
        squares += (loss - total / (i + 2)) ** 2
    return math.exp(-best)


@checked("promise")
class Promise:
    """What is to be guaranteed: the expected increase of a document's loss, capped at `bound`, is at most `increase`.

    Attributes:
        increase: nats per token, above 0.
        bound: increases above count as that much, those below its negative as its negative; above `increase`.
        delta: the guarantee may fail in this share of all calibrations.
    """

    increase: Positive
    bound: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not self.increase < self.bound:
            raise ConfigError(f"promise.increase = {self.increase} must lie between 0 and the bound, {self.bound}")

    def _unit(self, increases: Floats | float) -> Floats:
        return (np.clip(increases, -self.bound, self.bound) + self.bound) / (2 * self.bound)

    def p_value(self, increases: Sequence[float] | Floats) -> float:
        """Of "the expectation is above the promise", from the increases of independent documents, (N,)."""
        losses = self._unit(np.asarray(increases, dtype=np.float64))
        return betting_p(losses, float(self._unit(self.increase)), self.delta)

    def upper_bound(self, increases: Sequence[float]) -> float:
        """The smallest increase that these documents would let one promise; `bound` when there is none."""
        losses = self._unit(np.asarray(increases, dtype=np.float64))
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if 0 < middle < 1 and betting_p(losses, middle, self.delta) <= self.delta else (
                middle, high)  # fmt: skip
        return high * 2 * self.bound - self.bound

    def fewest_documents(self) -> int:
        """Documents without which even no increase at all could not be promised.

        The more documents without an increase, the smaller the p-value, so the number is doubled until it is enough and
        then bisected.
        """

        def enough(n: int) -> bool:
            return self.p_value(np.zeros(n)) <= self.delta

        high = 1
        while not enough(high):
            high *= 2
        low = high // 2  # too few, or none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


@dataclass(frozen=True)
class Tested:
    """One candidate on the calibration documents.

    Attributes:
        candidate: its index.
        p_value: see `Promise`.
        mean: of the increases.
        upper_bound: that could be promised for this candidate alone.
        n_capped: documents whose increase was above the bound.
    """

    candidate: int
    p_value: float
    mean: float
    upper_bound: float
    n_capped: int


def fixed_sequence(
    candidates: Sequence[int], increases: Callable[[int], Sequence[float]], promise: Promise
) -> list[Tested]:
    """Tests candidates in an order chosen without the calibration documents and stops at the first that fails.

    With probability 1 - delta no candidate passes whose expected increase is above the promise, however many are
    tested: to be wrong, the procedure must pass the first bad one, and that happens with probability delta at most.
    """
    tested = []
    for candidate in candidates:
        found = list(increases(candidate))
        tested.append(
            Tested(
                candidate,
                promise.p_value(found),
                float(np.mean(found)),
                promise.upper_bound(found),
                sum(increase > promise.bound for increase in found),
            )
        )
        if tested[-1].p_value > promise.delta:
            break
    return tested
