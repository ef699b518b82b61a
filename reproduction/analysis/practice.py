"""Practice curves: five laws by which a probability or an effort falls with encounters, fitted by likelihood.

Laws (paper sec. on practice curves has the first only), up to their height: power `k^-g`, exponential `exp(-k / c)`,
logistic `1 / (1 + exp((k - c) / w))`, Weibull `exp(-(k / c)^g)`; and a step, with one level before an encounter and
another from it on. Only the step can rise, so the other curves are highest at the first encounter. The height there is
a parameter of every law and is searched below the `ceiling` of the observations, because a probability is at most 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import optimize

_LOGS = (-20.0, 25.0)  # bounds of the search, logs of parameters
_SAME = 1e-3  # nats within which two fits count as equally likely


@dataclass(frozen=True, kw_only=True)
class Law:
    """A family of curves over k = 1, 2, ...

    Attributes:
        log_shape: log of the curve up to its height, of k (N,) and the logs of the parameters after the height.
        starts: parameters from which the search begins, given k (N,).
        names: names of the parameters, after `exp`; the first is the height at the first encounter.
    """

    log_shape: Callable[[np.ndarray, np.ndarray], np.ndarray]
    starts: Callable[[np.ndarray], list[list[float]]]
    names: tuple[str, ...]

    def log_curve(self, k: np.ndarray, logs: np.ndarray, first: float) -> np.ndarray:
        """Log of the curve at k (N,), whose height `exp(logs[0])` is that at the encounter `first`."""
        shape = self.log_shape(np.append(k, first), logs[1:])
        return logs[0] + shape[:-1] - shape[-1]


def _power(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -np.exp(p[0]) * np.log(k)


def _exponential(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -k / np.exp(p[0])


def _logistic(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, (k - np.exp(p[0])) / np.exp(p[1]))


def _weibull(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -np.exp(np.minimum(np.exp(p[1]) * (np.log(k) - p[0]), 60.0))


def _step(k: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.where(k < np.exp(p[0]), 0.0, p[1])


def _log_places(k: np.ndarray) -> list[float]:
    return [float(x) for x in np.quantile(np.log(k), (0.15, 0.35, 0.55, 0.75, 0.95))]


LAWS: dict[str, Law] = {
    "power": Law(
        log_shape=_power,
        names=("height", "exponent"),
        starts=lambda _: [[float(np.log(g))] for g in (0.01, 0.05, 0.3, 1.0)],
    ),
    "exponential": Law(
        log_shape=_exponential, names=("height", "scale"), starts=lambda k: [[c] for c in _log_places(k)]
    ),
    "logistic": Law(
        log_shape=_logistic,
        names=("height", "middle", "scale"),
        starts=lambda k: [[c, c + w] for c in _log_places(k) for w in (-2.5, -1.0)],
    ),
    # A step fits equally well anywhere between two encounters, so all intervals are tried without a search.
    "step": Law(log_shape=_step, names=("height", "place", "factor"), starts=lambda _: []),
    "weibull": Law(
        log_shape=_weibull,
        names=("height", "scale", "shape"),
        starts=lambda k: [[c, g] for c in _log_places(k) for g in (-0.7, 0.0, 1.2)],
    ),
}


class Errors(Protocol):
    """A distribution of observations around a curve."""

    n_parameters: int
    ceiling: float

    @property
    def n(self) -> int:
        """Observations."""
        ...

    def nats(self, log_curve: np.ndarray) -> float:
        """Negative log likelihood of the observations under the log of a curve (N,)."""
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
    ceiling = 1.0

    @property
    def n(self) -> int:
        """Trials."""
        return int(self.trials.sum())

    def nats(self, log_curve: np.ndarray) -> float:
        """Negative log likelihood; infinite where the curve is 0 or 1 and the observations are not."""
        misses = self.trials - self.hits
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 times the log of 0 is 0
            hit = np.where(self.hits > 0, self.hits * log_curve, 0.0)
            miss = np.where(misses > 0, misses * np.log(-np.expm1(log_curve)), 0.0)
        return -float((hit + miss).sum())

    def mean(self, where: np.ndarray) -> float:
        """Share of hits."""
        return float(self.hits[where].sum() / max(self.trials[where].sum(), 1))


@dataclass(frozen=True)
class LogNormal:
    """`values` (N,), positive, with normal errors of one unknown size in the log."""

    values: np.ndarray
    n_parameters = 1
    ceiling = np.inf

    @property
    def n(self) -> int:
        """Observations."""
        return len(self.values)

    def nats(self, log_curve: np.ndarray) -> float:
        """Negative log likelihood under the likeliest size of the errors, at least 1e-6."""
        error = np.log(self.values) - log_curve
        return 0.5 * self.n * float(np.log(max((error**2).mean(), 1e-12)) + 1 + np.log(2 * np.pi))

    def mean(self, where: np.ndarray) -> float:
        """The geometric mean."""
        return float(np.exp(np.log(self.values[where]).mean()))


@dataclass(frozen=True, kw_only=True)
class PracticeFit:
    """A fitted law.

    Attributes:
        law: name of the law in `LAWS`.
        parameters: parameters by name.
        first: the first encounter, at which the height is taken.
        nats: negative log likelihood.
        aic: Akaike's criterion, with the correction for few observations.
        at_bounds: names of parameters whose bound is as likely as their value, so they are not determined by the data.
    """

    law: str
    parameters: Mapping[str, float]
    first: float
    nats: float
    aic: float
    at_bounds: tuple[str, ...] = ()

    def curve(self, k: np.ndarray) -> np.ndarray:
        """The curve at encounters k (N,), `first` or more."""
        with np.errstate(divide="ignore"):
            logs = np.log([self.parameters[name] for name in LAWS[self.law].names])
        return np.exp(LAWS[self.law].log_curve(k, logs, self.first))


def fit(law: str, k: np.ndarray, errors: Errors) -> PracticeFit:
    """Fits the most likely curve of a law that stays below the observations' ceiling.

    Args:
        law: name in `LAWS`.
        k: encounters, (N,), 1 or more.
        errors: the observations at them.

    Raises:
        ArithmeticError: when the search does not settle.
    """
    family, first = LAWS[law], float(k.min())

    def nats(logs: np.ndarray) -> float:
        return errors.nats(family.log_curve(k, logs, first))

    if law == "step":
        found, at_bounds = _best_step(k, errors, nats), ()
    else:
        height = float(np.log(max(errors.mean(k <= np.quantile(k, 0.3)), 1e-6))) - 1e-3
        bounds = [(_LOGS[0], min(float(np.log(errors.ceiling)), _LOGS[1])), *[_LOGS] * (len(family.names) - 1)]
        found = _search(nats, [np.array([height, *start]) for start in family.starts(k)], bounds)
        at_bounds = _bounding(nats, found, bounds, family.names)
    n_parameters = len(family.names) + errors.n_parameters
    spare = errors.n - n_parameters - 1
    least = nats(found)
    aic = 2 * least + 2 * n_parameters + (2 * n_parameters * (n_parameters + 1) / spare if spare > 0 else np.inf)
    parameters = {name: float(value) for name, value in zip(family.names, np.exp(found), strict=True)}
    return PracticeFit(law=law, parameters=parameters, first=first, nats=least, aic=aic, at_bounds=at_bounds)


def _search(
    nats: Callable[[np.ndarray], float], starts: Sequence[np.ndarray], bounds: Sequence[tuple[float, float]]
) -> np.ndarray:
    """The best result of searches from the three best starts, repeated until nothing is gained."""

    def down_from(start: np.ndarray) -> optimize.OptimizeResult:
        simplex = np.vstack([start, start - 0.3 * np.eye(len(start))])
        return optimize.minimize(nats, start, method="Nelder-Mead", bounds=bounds,
                                 options={"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-4})  # fmt: skip

    best = min((down_from(start) for start in sorted(starts, key=nats)[:3]), key=lambda end: end.fun)
    for _ in range(30):
        again = down_from(np.clip(best.x, *np.transpose(bounds)))
        if again.fun > best.fun - _SAME:
            return best.x
        best = again
    raise ArithmeticError(f"a fit went on falling at {best.fun} nats; its law may not suit the observations")


def _bounding(
    nats: Callable[[np.ndarray], float], found: np.ndarray, bounds: Sequence[tuple[float, float]], names: Sequence[str]
) -> tuple[str, ...]:
    """Names of parameters that are equally likely at a bound."""
    least, hit = nats(found), []
    for i, (name, ends) in enumerate(zip(names, bounds, strict=True)):
        moved = [np.where(np.arange(len(found)) == i, end, found) for end in ends]
        if any(nats(one) <= least + _SAME for one in moved):
            hit.append(name)
    return tuple(hit)


def _best_step(k: np.ndarray, errors: Errors, nats: Callable[[np.ndarray], float]) -> np.ndarray:
    """Tries a step in every interval between two encounters."""
    places = np.unique(k)
    tried = []
    for place in np.sqrt(places[1:] * places[:-1]):
        before, after = errors.mean(k < place), errors.mean(k >= place)
        with np.errstate(divide="ignore"):
            level = np.log(max(before, 1e-12))
            tried.append(np.array([level, np.log(place), np.log(after) - level]))
    return min(tried, key=nats)


def compare(k: np.ndarray, errors: Errors) -> dict[str, PracticeFit]:
    """Fits all laws to the same observations, the best by AIC first; of equals, the step, which is a limit of others.

    Args:
        k: encounters, (N,).
        errors: the observations at them.

    Raises:
        ValueError: when k is not 1 or more, or there are fewer than four different encounters.
    """
    k = np.asarray(k, dtype=float)
    if (k < 1).any() or len(np.unique(k)) < 4:
        raise ValueError(f"k = {k.tolist()} must hold at least four different encounters, counted from 1")
    fits = [fit(law, k, errors) for law in LAWS]
    return {f.law: f for f in sorted(fits, key=lambda f: (round(f.aic, 1), f.law != "step"))}


def aic_weights(fits: Mapping[str, PracticeFit]) -> dict[str, float]:
    """Akaike weights, which add up to 1."""
    best = min(f.aic for f in fits.values())
    raw = {law: np.exp(-0.5 * (f.aic - best)) for law, f in fits.items()}
    return {law: float(w / sum(raw.values())) for law, w in raw.items()}


def least_squares_exponent(k: np.ndarray, shares: np.ndarray) -> float:
    """Exponent of the power law nearest to shares (N,) at k (N,) in unweighted least squares, nowhere above 1."""

    def error(log_exponent: float) -> float:
        shape = k ** -np.exp(log_exponent)
        height = min(float(shape @ shares / (shape @ shape)), float(k.min() ** np.exp(log_exponent)))
        return float(((shares - height * shape) ** 2).sum())

    grid = np.linspace(-12.0, 3.0, 151)
    best = int(np.argmin([error(x) for x in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(np.exp(optimize.minimize_scalar(error, bounds=ends, method="bounded").x))


def line_exponent(k: np.ndarray, shares: np.ndarray) -> float:
    """Minus the slope of a line through the logs of shares (N,) and k (N,); shares of 0 have no log and are left out.

    NaN with fewer than two of them.
    """
    seen = shares > 0
    return float(-np.polyfit(np.log(k[seen]), np.log(shares[seen]), 1)[0]) if seen.sum() > 1 else np.nan
