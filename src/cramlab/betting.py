"""Tests of the mean of bounded outcomes by betting: for a fixed sample, and for a stream that never ends.

A gambler stakes a share of the capital before each outcome. If the hypothesis is true, no strategy makes the expected
capital grow, so by Ville's inequality the capital ever reaches 1 / alpha with probability alpha at most. Capital is
therefore evidence against the hypothesis that may be looked at at any time: an e-process.

Source: Waudby-Smith and Ramdas (2024) for betting on means; Ramdas et al. (2023) for e-processes; the two strategies of
`EProcess` and their mixture are ours, after CUSUM and Shiryaev-Roberts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Stakes as shares of the largest one that cannot ruin the gambler, 1 / mean: for changes from small to large.
_SHARES = np.array([0.9, 0.6, 0.3, 0.15, 0.08, 0.04, 0.02, 0.01])
_CAUTION = 2.0  # weight of "nothing has changed" against the stakes that recent outcomes favour
_RECENT = 0.75  # share of the capital that follows recent outcomes; the rest bets on every time of change
_HIGHEST = 30.0  # of logarithms that are exponentiated


def betting_p(losses: Floats, risk: float, delta: float) -> float:
    """P-value of "the expected loss is above `risk`", with power where losses vary little, as those of documents do.

    The gambler bets before each loss that it is below `risk`; the inverse of the largest capital ever held is a
    p-value.

    Args:
        losses: independent losses in [0, 1], (N,), in an order that does not depend on them.
        risk: between 0 and 1.
        delta: significance level for which the bets are tuned; the p-value is valid for any.
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


def highest_mean(losses: Floats, delta: float) -> float:
    """Upper confidence bound of the expected loss: the smallest that `betting_p` rejects being exceeded; 1: none.

    Args:
        losses: independent losses in [0, 1], (N,).
        delta: probability that the bound is too low, at most.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        passes = 0 < middle < 1 and betting_p(losses, middle, delta) <= delta
        low, high = (low, middle) if passes else (middle, high)
    return high


class EProcess:
    """Evidence that outcomes in [0, 1] have come to be above a promised mean; many streams side by side.

    The hypothesis is that each outcome, given all before it, has an expectation of at most `mean`. Three quarters of
    the capital stake only while recent outcomes are above the promise (some stake's CUSUM is above 0), so they are kept
    over a long time of peace. The rest is spread over all possible times of a change, of which the k-th gets
    1 / log2(k + 1) - 1 / log2(k + 2), and over stakes from small to large.

    Args:
        mean: promised mean, above 0 and below 1.
        shape: shape of the streams.

    Raises:
        ValueError: when `mean` is not between 0 and 1.
    """

    def __init__(self, mean: float, shape: tuple[int, ...] = ()) -> None:
        if not 0 < mean < 1:
            raise ValueError(f"mean = {mean} must be above 0 and below 1: the promised mean of outcomes in [0, 1]")
        self.mean = mean
        self.stakes = _SHARES / mean
        self.n_seen = np.zeros(shape, dtype=np.int64)
        self._recent = np.zeros((*shape, len(_SHARES)))  # CUSUM of each stake
        self._following = np.zeros(shape)  # logarithm of the capital that follows recent outcomes
        self._started = np.full((*shape, len(_SHARES)), -np.inf)  # of the capital staked since all times of a change

    def update(self, outcomes: Floats | float, seen: NDArray[np.bool_] | bool = True) -> None:
        """Takes one outcome of every stream, or of those that `seen` marks.

        Args:
            outcomes: numbers in [0, 1], of the shape of the streams.
            seen: bool of the same shape.

        Raises:
            ValueError: when an outcome is not in [0, 1].
        """
        seen = np.broadcast_to(seen, self.n_seen.shape)
        outcomes = np.broadcast_to(np.asarray(outcomes, dtype=np.float64), seen.shape)
        if not bool(((outcomes >= 0) & (outcomes <= 1))[seen].all()):
            raise ValueError(f"outcomes = {outcomes[seen].ravel()[:5]} must be numbers from 0 to 1")
        excess = np.where(seen, outcomes, self.mean) - self.mean
        gains = np.log1p(self.stakes * excess[..., None])
        favour = np.expm1(np.minimum(self._recent, _HIGHEST)) / len(self.stakes)
        stake = favour @ self.stakes / (_CAUTION + favour.sum(-1))
        self._following += np.log1p(stake * excess)
        self._recent = np.maximum(self._recent + gains, 0.0)
        begins = np.log((_left(self.n_seen) - _left(self.n_seen + 1)) / len(self.stakes))[..., None]
        self._started = np.where(seen[..., None], np.logaddexp(self._started, begins) + gains, self._started)
        self.n_seen = self.n_seen + seen

    def renew(self, which: NDArray[np.bool_]) -> None:
        """Lets some streams, bool of the shape of the streams, begin again; their false alarms count anew."""
        fresh = EProcess(self.mean, self.n_seen.shape)
        for name in ("n_seen", "_recent", "_following", "_started"):
            own = getattr(self, name)
            setattr(self, name, np.where(which.reshape(which.shape + (1,) * (own.ndim - which.ndim)),
                                         getattr(fresh, name), own))  # fmt: skip

    @property
    def log_evidence(self) -> Floats:
        """Logarithm of each stream's capital: 0 at first; at least log(1 / alpha) with probability alpha at most."""
        kept = np.log(_left(self.n_seen))
        spread = np.logaddexp(np.logaddexp.reduce(self._started, axis=-1), kept)
        return np.logaddexp(math.log(_RECENT) + self._following, math.log(1 - _RECENT) + spread)


def _left(n_seen: NDArray[np.int64]) -> Floats:
    """Share of the spread capital that is not staked yet after as many outcomes."""
    return 1 / np.log2(n_seen + 2)


def evidence_by_hand(outcomes: Sequence[float], mean: float) -> list[float]:
    """`EProcess.log_evidence` of one stream after each outcome, computed from its definition: slow, for tests."""
    stakes = [share / mean for share in _SHARES.tolist()]
    following, found = 1.0, []

    def grown(stake: float, begin: int, end: int) -> float:
        return math.prod(1 + stake * (outcome - mean) for outcome in outcomes[begin:end])

    for n in range(len(outcomes)):
        # The CUSUM of a stake is the logarithm of what it would have made since the best time to begin.
        favour = [max(grown(stake, begin, n) for begin in range(n + 1)) - 1 for stake in stakes]
        stake = sum(f * s for f, s in zip(favour, stakes, strict=True)) / (_CAUTION * len(stakes) + sum(favour))
        following *= 1 + stake * (outcomes[n] - mean)
        weights = [1 / math.log2(k + 2) - 1 / math.log2(k + 3) for k in range(n + 1)]
        spread = sum(w * grown(s, k, n + 1) / len(stakes) for k, w in enumerate(weights) for s in stakes)
        spread += 1 - sum(weights)
        found.append(math.log(_RECENT * following + (1 - _RECENT) * spread))
    return found


class Watch:
    """Alarms over audited outcomes, of all together and of each group; false ones have probability alpha in all.

    Half of the capital is for all outcomes together, the other half is divided equally among the groups. The sum is
    evidence against the hypothesis that no expectation is above the promised mean, whichever groups the outcomes come
    from, as long as their choice does not depend on them.

    Args:
        alpha: probability of any false alarm in a stream that never ends, above 0 and below 1.
        mean: promised mean of the outcomes, which are in [0, 1].
        n_groups: number of groups, such as patterns, layers or domains; 0: no groups are told apart.
        n_streams: number of streams, which are watched independently of each other.

    Raises:
        ValueError: when an argument is out of its range.
    """

    def __init__(self, alpha: float, mean: float, n_groups: int = 0, n_streams: int = 1) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha = {alpha} must be above 0 and below 1: the probability of a false alarm")
        if n_groups < 0 or n_streams < 1:
            raise ValueError(f"n_groups = {n_groups} must be at least 0, and n_streams = {n_streams} at least 1")
        self.alpha, self.n_groups = alpha, n_groups
        self.evidence = EProcess(mean, (n_streams, 1 + n_groups))
        self.peak = np.zeros(n_streams)
        self.group_peak = np.full((n_streams, n_groups), -np.inf)

    def update(self, outcomes: Floats | float, groups: NDArray[np.int64] | int | None = None) -> None:
        """Takes one outcome of each stream, (n_streams,), with the number of its group, (n_streams,).

        Raises:
            ValueError: when an outcome is not in [0, 1], or a group is missing or not one of the watch.
        """
        seen = np.ones(self.evidence.n_seen.shape, dtype=np.bool_)
        if self.n_groups:
            if groups is None or not bool(np.isin(groups, np.arange(self.n_groups)).all()):
                raise ValueError(f"groups = {groups} must be numbers of groups, from 0 to {self.n_groups - 1}")
            seen[:, 1:] = np.arange(self.n_groups) == np.broadcast_to(groups, len(seen))[:, None]
        outcomes = np.broadcast_to(np.asarray(outcomes, dtype=np.float64), len(seen))[:, None]
        self.evidence.update(np.broadcast_to(outcomes, seen.shape), seen)
        found = self.evidence.log_evidence
        now = found[:, 0]
        if self.n_groups:
            by_group = found[:, 1:] - math.log(self.n_groups)
            now = np.logaddexp(found[:, 0], np.logaddexp.reduce(by_group, axis=1)) - math.log(2)
            self.group_peak = np.maximum(self.group_peak, by_group - math.log(2))
        self.peak = np.maximum(self.peak, now)

    def renew(self, groups: NDArray[np.bool_]) -> None:
        """Lets some groups, bool (n_groups,), begin again in all streams; what has been seen of all together stays."""
        self.evidence.renew(np.broadcast_to(np.r_[False, groups], self.evidence.n_seen.shape))
        self.group_peak[:, groups] = -np.inf

    @property
    def alarms(self) -> NDArray[np.bool_]:
        """Whether each stream has had an alarm, (n_streams,)."""
        return self.peak >= -math.log(self.alpha)

    @property
    def stale(self) -> NDArray[np.bool_]:
        """Groups whose own evidence has sufficed for an alarm, (n_streams, n_groups)."""
        return self.group_peak >= -math.log(self.alpha)
