"""Risk control over documents: p-values of the hypothesis that the expected loss increase is above the guaranteed one.

Source: Learn then Test (Angelopoulos et al. 2021) for the procedure and the Hoeffding-Bentkus p-value. The p-value that
is used is in `betting`.
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

from cramlab.betting import betting_p, highest_mean
from cramlab.config import ConfigError, Positive, checked

Floats = NDArray[np.float64]


def hoeffding_bentkus_p(losses: Floats, risk: float) -> float:
    """P-value of "the expected loss is above `risk`" from independent losses in [0, 1], (N,), for any N."""
    n, mean = len(losses), min(float(losses.mean()), risk)
    divergence = sum(
        a * math.log(a / b) for a, b in ((mean, risk), (1 - mean, 1 - risk)) if a > 0
    )  # KL divergence of two Bernoulli distributions, nats
    bentkus = math.e * float(binom.cdf(math.ceil(n * float(losses.mean())), n, risk))
    return min(1.0, math.exp(-n * divergence), bentkus)


@checked("guarantee")
class Guarantee:
    """The claim that the expected increase of a document's loss, capped at `bound`, is at most `increase`.

    Attributes:
        increase: guaranteed increase, nats per token, above 0.
        bound: cap on the increase of a document in both directions, nats per token, above `increase`.
        delta: probability that the guarantee fails, at most.
    """

    increase: Positive
    bound: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not self.increase < self.bound:
            raise ConfigError(f"guarantee.increase = {self.increase} must be below guarantee.bound = {self.bound}")

    def unit(self, increases: Floats | float) -> Floats:
        """Increases, capped in both directions, as losses in [0, 1] of the same shape."""
        return (np.clip(increases, -self.bound, self.bound) + self.bound) / (2 * self.bound)

    def p_value(self, increases: Sequence[float] | Floats) -> float:
        """P-value of "the expected increase is above the guaranteed one", from independent documents, (N,)."""
        losses = self.unit(np.asarray(increases, dtype=np.float64))
        return betting_p(losses, float(self.unit(self.increase)), self.delta)

    def upper_bound(self, increases: Sequence[float]) -> float:
        """The smallest increase that these documents suffice to guarantee; `bound` when there is none."""
        losses = self.unit(np.asarray(increases, dtype=np.float64))
        return highest_mean(losses, self.delta) * 2 * self.bound - self.bound

    def room(self, n_documents: int) -> float:
        """The largest increase, nats per token, that passes when every one of `n_documents` documents has it."""
        low, high = -self.bound, self.increase
        for _ in range(50):
            middle = (low + high) / 2
            passes = self.p_value(np.full(n_documents, middle)) <= self.delta
            low, high = (middle, high) if passes else (low, middle)
        return low

    def relaxed(self, increases: Sequence[float]) -> Guarantee:
        """The guarantee with the smallest larger increase that these documents pass; the cap grows with the increase.

        With the cap of this guarantee, `upper_bound` can be below the mean of the increases, as it counts large ones as
        the cap. The increase has three digits and is searched upwards, so that what is returned does pass.

        Raises:
            ValueError: when there are fewer documents than `fewest_documents`.
        """
        if len(increases) < self.fewest_documents():
            raise ValueError(f"{len(increases)} documents guarantee nothing; use at least {self.fewest_documents()}")
        high = self._with(self.increase)
        while high.p_value(increases) > high.delta:
            high = self._with(2 * high.increase)
        low = self.increase
        while high.increase > low * 1.0005:
            middle = self._with((low + high.increase) / 2)
            if middle.p_value(increases) <= self.delta:
                high = middle
            else:
                low = middle.increase
        digits = 2 - math.floor(math.log10(high.increase))
        step, n = 10.0**-digits, math.ceil(high.increase * 10**digits)
        while (rounded := self._with(float(f"{n * step:.3g}"))).p_value(increases) > self.delta:
            n += 1
        return rounded

    def _with(self, increase: float) -> Guarantee:
        """The guarantee of another increase, with a cap that is as many times as large."""
        return Guarantee(increase=increase, bound=self.bound / self.increase * increase, delta=self.delta)

    def fewest_documents(self) -> int:
        """Number of documents that suffice when no document's loss increases; with fewer nothing can be guaranteed.

        The p-value falls with the number of such documents, so the number is doubled until it suffices, then bisected.
        """

        def enough(n: int) -> bool:
            return self.p_value(np.zeros(n)) <= self.delta

        high = 1
        while not enough(high):
            high *= 2
        low = high // 2  # does not suffice
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


@dataclass(frozen=True)
class Tested:
    """One candidate threshold on the calibration documents.

    Attributes:
        candidate: index of the candidate.
        p_value: see `Guarantee.p_value`.
        mean: mean increase, nats per token.
        upper_bound: smallest increase that could be guaranteed for this candidate alone, nats per token.
        n_capped: number of documents whose increase was above the cap.
    """

    candidate: int
    p_value: float
    mean: float
    upper_bound: float
    n_capped: int


def fixed_sequence(
    candidates: Sequence[int], increases: Callable[[int], Sequence[float]], guarantee: Guarantee
) -> list[Tested]:
    """Tests candidates in an order chosen without the calibration documents and stops at the first that fails.

    With probability 1 - delta no candidate passes whose expected increase is above the guaranteed one, however many are
    tested: an error requires that the first such candidate passes, which has probability delta at most.

    Args:
        candidates: candidates in the order of the tests.
        increases: gives a candidate's loss increases on the calibration documents, nats per token.
        guarantee: what is tested.

    Returns:
        All tested candidates, the failed one last.
    """
    tested = []
    for candidate in candidates:
        observed = list(increases(candidate))
        tested.append(
            Tested(
                candidate,
                guarantee.p_value(observed),
                float(np.mean(observed)),
                guarantee.upper_bound(observed),
                sum(increase > guarantee.bound for increase in observed),
            )
        )
        if tested[-1].p_value > guarantee.delta:
            break
    return tested
