"""Practice curves: how a probability or an effort falls with the number of encounters, by five laws of one likelihood.

Laws (paper sec. on practice curves has the first only): power `a k^-g`, exponential `a exp(-k / c)`, logistic
`a / (1 + exp((k - c) / w))`, step `a` before `c` and `b` from there on, Weibull `a exp(-(k / c)^g)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import optimize

_LEAST = 1e-6  # probabilities are kept this far from 0 and 1, efforts this far from 0


@dataclass(frozen=True, kw_only=True)
class Law:
    """A family of curves over k = 1, 2, ...

    Attributes:
        curve: of k (N,) and the parameters, which are logs of positive numbers.
        starts: parameters from which the search begins, given k (N,).
        names: of the parameters, after `exp`.
    """

    curve: Callable[[np.ndarray, np.ndarray], np.ndarray]
    starts: Callable[[np.ndarray], list[list[float]]]
    names: tuple[str, ...]


def _power(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.exp(p[0] - np.exp(p[1]) * np.log(k))


def _exponential(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.exp(p[0] - k / np.exp(p[1]))


def _logistic(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.exp(p[0]) / (1 + np.exp(np.clip((k - np.exp(p[1])) / np.exp(p[2]), -60, 60)))


def _weibull(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.exp(p[0] - np.exp(np.clip(np.exp(p[2]) * (np.log(k) - p[1]), -60, 60)))


def _step(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.where(k < np.exp(p[1]), np.exp(p[0]), np.exp(p[2]))


def _log_places(k: np.ndarray) -> list[float]:
    return [float(x) for x in np.quantile(np.log(k), (0.15, 0.35, 0.55, 0.75, 0.95))]


LAWS: dict[str, Law] = {
    "power": Law(
        curve=_power, names=("a", "exponent"), starts=lambda _: [[-0.1, float(np.log(g))] for g in (0.05, 0.3, 1.0)]
    ),
    "exponential": Law(curve=_exponential, names=("a", "scale"), starts=lambda k: [[-0.1, c] for c in _log_places(k)]),
    "logistic": Law(
        curve=_logistic,
        names=("a", "middle", "scale"),
        starts=lambda k: [[-0.1, c, c + w] for c in _log_places(k) for w in (-2.5, -1.0)],
    ),
    # Between two encounters every place of a step is the same, so all of them are tried and nothing is searched.
    "step": Law(curve=_step, names=("a", "place", "b"), starts=lambda _: []),
    "weibull": Law(
        curve=_weibull,
        names=("a", "scale", "shape"),
        starts=lambda k: [[-0.1, c, g] for c in _log_places(k) for g in (-0.7, 0.0, 1.2)],
    ),
}


class Errors(Protocol):
    """How observations scatter around a curve."""

    n_parameters: int

    @property
    def n(self) -> int:
        """Observations."""
        ...

    def nats(self, curve: np.ndarray) -> float:
        """Negative log likelihood of the observations under a curve (N,)."""
        ...

    def mean(self, where: np.ndarray) -> float:
        """The best constant for some of the observations, bool (N,)."""
        ...


@dataclass(frozen=True)
class Binomial:
    """`hits` (N,) of `trials` (N,), each trial on its own. The constant of the likelihood is left out."""

    hits: np.ndarray
    trials: np.ndarray
    n_parameters = 0

    @property
    def n(self) -> int:
        """Trials."""
        return int(self.trials.sum())

    def nats(self, curve: np.ndarray) -> float:
        """See `Errors`."""
        p = np.clip(curve, _LEAST, 1 - _LEAST)
        # What begins above 1 and is cut there would be a step under another name.
        impossible = 1e4 * float(np.maximum(curve - 1, 0.0).sum())
        return impossible - float((self.hits * np.log(p) + (self.trials - self.hits) * np.log1p(-p)).sum())

    def mean(self, where: np.ndarray) -> float:
        """See `Errors`."""
        return float(self.hits[where].sum() / max(self.trials[where].sum(), 1))


@dataclass(frozen=True)
class LogNormal:
    """`values` (N,), positive, that scatter in proportion: normal errors of one unknown size in the log."""

    values: np.ndarray
    n_parameters = 1

    @property
    def n(self) -> int:
        """Observations."""
        return len(self.values)

    def nats(self, curve: np.ndarray) -> float:
        """See `Errors`."""
        error = np.log(self.values) - np.log(np.maximum(curve, _LEAST))
        return 0.5 * self.n * float(np.log(max((error**2).mean(), 1e-12)) + 1 + np.log(2 * np.pi))

    def mean(self, where: np.ndarray) -> float:
        """See `Errors`."""
        return float(np.exp(np.log(self.values[where]).mean()))


@dataclass(frozen=True, kw_only=True)
class PracticeFit:
    """A law fitted.

    Attributes:
        law: its name in `LAWS`.
        parameters: by name.
        nats: negative log likelihood.
        aic: Akaike's criterion, with the correction for few observations.
    """

    law: str
    parameters: Mapping[str, float]
    nats: float
    aic: float

    @property
    def logs(self) -> np.ndarray:
        """Logs of the parameters, in the order of the law."""
        return np.log(np.maximum([self.parameters[name] for name in LAWS[self.law].names], 1e-300))

    def curve(self, k: np.ndarray) -> np.ndarray:
        """Its value at encounters k (N,)."""
        return LAWS[self.law].curve(k, self.logs)


def fit(law: str, k: np.ndarray, errors: Errors, near: PracticeFit | None = None) -> PracticeFit:
    """The most likely curve of a law.

    Args:
        law: name in `LAWS`.
        k: encounters, (N,), 1 or more.
        errors: the observations at them.
        near: a fit of similar data, from which the search begins instead of from many places.
    """
    family = LAWS[law]
    if law == "step":
        found = _best_step(k, errors)
    else:
        height = np.log(max(errors.mean(k <= np.quantile(k, 0.3)), _LEAST))
        starts = [[start[0] + height, *start[1:]] for start in family.starts(k)]
        found = _search(family, k, errors, starts if near is None else [list(near.logs)])
    nats = errors.nats(family.curve(k, found))
    n_parameters = len(family.names) + errors.n_parameters
    spare = errors.n - n_parameters - 1
    aic = 2 * nats + 2 * n_parameters + (2 * n_parameters * (n_parameters + 1) / spare if spare > 0 else np.inf)
    parameters = {name: float(value) for name, value in zip(family.names, np.exp(np.clip(found, -50, 50)), strict=True)}
    return PracticeFit(law=law, parameters=parameters, nats=nats, aic=aic)


def _search(family: Law, k: np.ndarray, errors: Errors, starts: list[list[float]]) -> np.ndarray:
    """The best end of a search from every start."""
    ends = [
        optimize.minimize(
            lambda p: errors.nats(family.curve(k, p)),
            start,
            method="Nelder-Mead",
            options={"xatol": 1e-4, "fatol": 1e-4, "maxiter": 600},
        )
        for start in starts
    ]
    return min(ends, key=lambda end: end.fun).x


def _best_step(k: np.ndarray, errors: Errors) -> np.ndarray:
    """Every place between two encounters tried."""
    places = np.unique(k)
    tried = []
    for place in np.sqrt(places[1:] * places[:-1]):
        a, b = errors.mean(k < place), errors.mean(k >= place)
        tried.append(np.log(np.maximum([a, place, b], _LEAST)))
    return min(tried, key=lambda p: errors.nats(_step(k, p)))


def compare(k: np.ndarray, errors: Errors, near: Mapping[str, PracticeFit] | None = None) -> dict[str, PracticeFit]:
    """All laws fitted to the same observations, the best by AIC first; of equals, a step, which is a limit of others.

    Args:
        k: encounters, (N,).
        errors: the observations at them.
        near: fits of similar data, from which to begin.

    Raises:
        ValueError: when k is not 1 or more, or there are fewer than four different encounters.
    """
    k = np.asarray(k, dtype=float)
    if (k < 1).any() or len(np.unique(k)) < 4:
        raise ValueError(f"k = {k.tolist()} must hold at least four different encounters, counted from 1")
    fits = [fit(law, k, errors, near[law] if near else None) for law in LAWS]
    return {f.law: f for f in sorted(fits, key=lambda f: (round(f.aic, 1), f.law != "step"))}


def aic_weights(fits: Mapping[str, PracticeFit]) -> dict[str, float]:
    """Akaike weights, which add up to 1."""
    best = min(f.aic for f in fits.values())
    raw = {law: np.exp(-0.5 * (f.aic - best)) for law, f in fits.items()}
    return {law: float(w / sum(raw.values())) for law, w in raw.items()}


@dataclass(frozen=True)
class Encounters:
    """The practice log of one run: `k` (bins,), `hits` and `trials` (patterns, bins)."""

    k: np.ndarray
    hits: np.ndarray
    trials: np.ndarray

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Encounters | None:
        """From a run's record; None where it has no practice log."""
        practice = record.get("practice")
        if not practice:
            return None
        firsts = np.array(practice["first_encounter"], dtype=float)
        # Bins double every second time; a bin stands for its geometric middle.
        lasts = np.append(firsts[1:] - 1, max(firsts[-1], np.floor(firsts[-1] * 4 / 3)))
        return cls(np.sqrt(firsts * lasts), np.array(practice["read"]), np.array(practice["n"], dtype=float))

    def pooled(self, patterns: np.ndarray | None = None) -> tuple[np.ndarray, Binomial]:
        """Over (resampled) patterns: encounters that were met, and what was read of them."""
        chosen = slice(None) if patterns is None else patterns
        hits, trials = self.hits[chosen].sum(axis=0), self.trials[chosen].sum(axis=0)
        met = trials > 0
        return self.k[met], Binomial(hits[met], trials[met])

    def after(self, encounter: float) -> Encounters:
        """What came after an encounter, as when all before was read by decree; encounters keep their number."""
        late = self.k > encounter
        return Encounters(self.k[late], self.hits[:, late], self.trials[:, late])


@dataclass(frozen=True, kw_only=True)
class PracticeSummary:
    """Runs of several seeds, averaged and pattern by pattern.

    Attributes:
        averaged: laws fitted to the average over patterns and seeds, best first.
        weights: Akaike weights of these.
        exponent: of the power law on the average: value, and 95% interval over seeds and patterns.
        chosen: share of bootstrap resamples in which a law is the best of the average.
        by_pattern: share of single patterns for which a law is the best.
        k: encounters of the average.
        mean: average at them.
    """

    averaged: Mapping[str, PracticeFit]
    weights: Mapping[str, float]
    exponent: tuple[float, float, float]
    chosen: Mapping[str, float]
    by_pattern: Mapping[str, float]
    k: np.ndarray
    mean: np.ndarray


def summarise(
    runs: Sequence[Encounters], *, n_resamples: int = 60, n_patterns: int = 40, seed: int = 0
) -> PracticeSummary:
    """Model selection on the average and on single patterns.

    Args:
        runs: one a seed.
        n_resamples: of the bootstrap, which draws seeds and then patterns within them, both with replacement.
        n_patterns: single patterns that are fitted, drawn over all runs.
        seed: of the draws.

    Raises:
        ValueError: without runs.

    Source: the warning is Heathcote, Brown and Mewhort (2000): averages over steps at different places are power-like.
    """
    if not runs:
        raise ValueError("there is no run with a practice log; train one with recurring patterns")
    rng = np.random.default_rng(seed)
    k, errors = _pool(runs, None)
    averaged = compare(k, errors)
    exponents, best = [], []
    for _ in range(n_resamples):
        drawn = [runs[i] for i in rng.integers(len(runs), size=len(runs))]
        again_k, again = _pool(drawn, rng)
        fits = compare(again_k, again, averaged)
        exponents.append(fits["power"].parameters["exponent"])
        best.append(next(iter(fits)))
    single = []
    for _ in range(n_patterns):
        run = runs[int(rng.integers(len(runs)))]
        one_k, one = run.pooled(np.array([rng.integers(len(run.hits))]))
        if len(one_k) >= 4:
            single.append(next(iter(compare(one_k, one))))
    low, high = np.percentile(exponents, (2.5, 97.5)) if exponents else (np.nan, np.nan)
    return PracticeSummary(
        averaged=averaged,
        weights=aic_weights(averaged),
        exponent=(averaged["power"].parameters["exponent"], float(low), float(high)),
        chosen=_shares(best),
        by_pattern=_shares(single),
        k=k,
        mean=errors.hits / errors.trials,
    )


def _pool(runs: Sequence[Encounters], rng: np.random.Generator | None) -> tuple[np.ndarray, Binomial]:
    """Sums over runs; with `rng`, over resampled patterns."""
    sums: dict[float, np.ndarray] = {}
    for run in runs:
        patterns = None if rng is None else rng.integers(len(run.hits), size=len(run.hits))
        k, one = run.pooled(patterns)
        for place, hits, trials in zip(k.tolist(), one.hits, one.trials, strict=True):
            sums[place] = sums.get(place, np.zeros(2)) + np.array([hits, trials])
    k = np.array(sorted(sums))
    hits, trials = np.array([sums[place] for place in k]).T
    return k, Binomial(hits, trials)


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {law: names.count(law) / len(names) for law in LAWS if law in names} if names else {}


def threshold_gate(
    k: np.ndarray, *, rate_spread: float, n_patterns: int, threshold: float = 0.1, rate: float = 0.02, seed: int = 0
) -> Encounters:
    """The null: any distillation whose error falls exponentially, and a gate that reads while the error is too large.

    Each pattern is read at every encounter until `exp(-rate_p k)` falls below the threshold, and never again: a step.
    Rates differ between patterns by a log-normal factor, so the average over patterns is smooth.

    Args:
        k: encounters, (N,).
        rate_spread: standard deviation of the log rate over patterns.
        n_patterns: patterns.
        threshold: error below which the gate no longer reads, 0 to 1.
        rate: median learning rate, a share of the error an encounter.
        seed: of the rates.

    Source: ours.
    """
    rates = rate * np.exp(rate_spread * np.random.default_rng(seed).standard_normal(n_patterns))
    hits = (np.exp(-rates[:, None] * k) > threshold).astype(float)
    return Encounters(np.asarray(k, dtype=float), hits, np.ones_like(hits))
