"""A change-point detector: whether a share falls in one sharp step, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from cramlab.config import Positive, Seed, Size, checked

_TEN_TO_NINETY = 2 * np.log(9.0)  # 10-90% width of a logistic of scale 1
_INFLATION = 1.15  # of resampled residuals: without it, 95% intervals cover 90% of planted steps


@checked("")
class DetectorConfig:
    """When a fall counts as a transition.

    Attributes:
        min_fold: least factor between the levels before and after.
        max_width_frac: largest 10-90% width, as a share of the observed span.
        min_side: least number of observations on either side of the change.
        margin: by how much the BIC of a step has to be below that of every gradual course, in nats.
        resolution: smallest share that the series can tell from zero; lower values are raised to it.
        confidence: confidence level of the intervals.
        n_resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.
    """

    min_fold: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    max_width_frac: Annotated[float, Field(gt=0, lt=1)] = 0.1
    min_side: Size = 3
    margin: float = 10.0
    resolution: Positive = 1e-4
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    n_resamples: Size = 400
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One sharp fall.

    Attributes:
        step: its middle, on the scale of logs.
        step_low: lower end of the interval of `step`.
        step_high: upper end.
        width: from 10 to 90% of the fall, steps.
        width_low: lower end of the interval of `width`.
        width_high: upper end.
        before: geometric mean of the last shares before the step, 0 to 1.
        after: geometric mean of the first shares after it, 0 to 1.
        unresolved: it is no wider than the least distance of two observations, which `width` then is, an upper bound.
        floored: the shares after it lie at the resolution or below, so `fold` is a lower bound.
    """

    step: float
    step_low: float
    step_high: float
    width: float
    width_low: float
    width_high: float
    before: float
    after: float
    unresolved: bool
    floored: bool

    @property
    def fold(self) -> float:
        """Factor by which the share fell."""
        return self.before / self.after


def detect(steps: Sequence[float], shares: Sequence[float], config: DetectorConfig | None = None) -> Transition | None:
    """Finds the transition of a series; None if the series is flat, gradual, rising or too short.

    A logistic step in log share on a straight trend is fitted by least squares over a grid of middles and widths. It
    has to beat the gradual courses (a trend, and a power law or exponential relaxation on a trend) by BIC. Intervals
    come from a bootstrap of blocks of residuals, which keeps their correlation in time.

    Args:
        steps: steps, increasing.
        shares: shares of the same length, 0 to 1.
        config: thresholds.

    Raises:
        ValueError: unless steps increase and both series are finite and of one length.

    Source: ours.
    """
    config = config or DetectorConfig()
    t, y = _checked(steps, shares, config.resolution)
    if len(t) < 2 * config.min_side + 2:
        return None
    middles, widths, curves = _candidates(t, config.min_side)
    trend = np.stack([np.ones_like(t), t], axis=1)
    bare = curves - _projected(curves, trend)
    (best,), (fall,) = _best_step(y[None], bare)
    without = y - fall * curves[best]
    residual = without - _projected(without, trend)
    rivals = min(_bic(y - _projected(y, design), design.shape[1]) for design in _gradual_designs(t, trend))
    width = widths[best]
    sharp = width <= config.max_width_frac * (t[-1] - t[0]) and np.exp(-fall) >= config.min_fold
    if not sharp or _bic(residual, 5) > rivals - 2 * config.margin:
        return None
    rng = np.random.default_rng(config.seed)
    noise = _INFLATION * _block_resamples(residual, config.n_resamples, rng)
    again, _ = _best_step(y - residual + noise, bare)
    tails = [50 * (1 - config.confidence), 50 * (1 + config.confidence)]
    (step_low, step_high), (width_low, width_high) = (np.percentile(x[again], tails) for x in (middles, widths))
    before, after = _levels(y, float(fall), curves[best], config.min_side)
    spacing = float(np.diff(t).min())
    # Positions between two observations cannot be distinguished, so intervals are widened by half their distance.
    gap = float(np.diff(t).max()) / 2
    return Transition(
        step=float(middles[best]),
        step_low=float(step_low - gap),
        step_high=float(step_high + gap),
        width=float(max(width, spacing)),
        width_low=float(width_low),
        width_high=float(width_high),
        before=float(np.exp(before)),
        after=float(np.exp(after)),
        unresolved=bool(width <= spacing),
        floored=bool(np.exp(after) <= 1.001 * config.resolution),
    )


def _levels(y: np.ndarray, fall: float, curve: np.ndarray, n: int) -> tuple[float, float]:
    """Mean logs beside a step, of `n` observations on either side that hold less than a tenth of it.

    They are taken from the observations instead of the trend, which is one line for both sides and may exceed a share
    of
    1 at the step. The part of the step that an observation holds is removed, but no level leaves the observed range.
    """
    before, after = np.flatnonzero(curve < 0.1)[-n:], np.flatnonzero(curve > 0.9)[:n]
    before = before if len(before) else np.array([0])
    after = after if len(after) else np.array([len(y) - 1])
    high, low = (y - fall * curve)[before].mean(), (y + fall * (1 - curve))[after].mean()
    return float(min(high, y.max())), float(max(low, y.min()))


def _checked(steps: Sequence[float], shares: Sequence[float], resolution: float) -> tuple[np.ndarray, np.ndarray]:
    t, s = np.asarray(steps, dtype=float), np.asarray(shares, dtype=float)
    if t.shape != s.shape or t.ndim != 1:
        raise ValueError(f"steps and shares have shapes {t.shape} and {s.shape}; give two series of one length")
    if not (np.isfinite(t).all() and np.isfinite(s).all()):
        raise ValueError("steps or shares hold a value that is no finite number; leave such rows out")
    if (np.diff(t) <= 0).any():
        raise ValueError("steps do not increase; sort the series and give each step once")
    return t, np.log(np.maximum(s, resolution))


def _candidates(t: np.ndarray, min_side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middles, widths and curves (0 before, 1 after) of all steps considered; (C,), (C,), (C, T)."""
    inner = t[min_side - 1 : len(t) - min_side + 1]
    middles = np.unique(np.concatenate([inner[:-1] + (inner[1:] - inner[:-1]) * part for part in (0.25, 0.5, 0.75)]))
    spacing, span = float(np.diff(t).min()), float(t[-1] - t[0])
    widths = np.geomspace(spacing / 2, span, 24)
    m, w = (grid.ravel() for grid in np.meshgrid(middles, widths, indexing="ij"))
    curves = 1 / (1 + np.exp(np.clip(-(t - m[:, None]) * _TEN_TO_NINETY / w[:, None], -60, 60)))
    return m, w, curves


def _projected(y: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Least squares of the rows of y (..., T) on the columns of a design (T, P): the fitted rows."""
    basis, _ = np.linalg.qr(design)
    return (y @ basis) @ basis.T


def _best_step(y: np.ndarray, bare: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every row of y (R, T), the candidate whose fall explains most of it, and that fall (<= 0), in logs.

    `bare` (C, T) are the candidates' curves with the trend taken out of them.
    """
    power = np.maximum((bare**2).sum(axis=1), 1e-9)
    cross = y @ bare.T  # (R, C)
    candidate = np.where(cross < 0, cross**2 / power, -1.0).argmax(axis=1)
    fall = cross[np.arange(len(y)), candidate] / power[candidate]
    return candidate, np.minimum(fall, 0.0)


def _gradual_designs(t: np.ndarray, trend: np.ndarray) -> list[np.ndarray]:
    """Courses without a step, as columns (T, P) to be fitted."""
    clock = t - t[0] + float(np.diff(t).min())
    span = float(t[-1] - t[0])
    shapes = [np.log(clock), np.log(np.maximum(t, 1.0))]
    # Relaxations slower than a fifth of the span; faster ones are steps that happen to begin the series.
    shapes += [np.exp(-clock / time) for time in np.geomspace(span / 5, 5 * span, 16)]
    alone = [np.stack([np.ones_like(t), shape], axis=1) for shape in shapes]
    return [trend[:, :1], trend, *alone, *(np.column_stack([design, t]) for design in alone)]


def _bic(residual: np.ndarray, n_parameters: int) -> float:
    """Bayes' criterion of a least-squares fit with normal noise."""
    n = len(residual)
    power = max(float((residual**2).mean()), 1e-12)
    return n * np.log(power) + (n_parameters + 1) * np.log(n)


def _block_resamples(residual: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Series of residuals put together from random blocks, (R, T)."""
    n = len(residual)
    length = max(1, round(n ** (1 / 3)))
    n_blocks = -(-n // length)
    starts = rng.integers(0, n - length + 1, size=(n_resamples, n_blocks))
    index = (starts[..., None] + np.arange(length)).reshape(n_resamples, -1)[:, :n]
    return residual[index]


def level_at(steps: Sequence[float], values: Sequence[float | None], step: float) -> float | None:
    """A series' value at a step, interpolated between the rows that know one; None outside them."""
    known = [(t, v) for t, v in zip(steps, values, strict=True) if v is not None]
    if len(known) < 2 or not known[0][0] <= step <= known[-1][0]:
        return None
    return float(np.interp(step, [t for t, _ in known], [v for _, v in known]))


def crossing(steps: Sequence[float], values: Sequence[float | None], level: float) -> float | None:
    """The first step at which a series reaches a level and stays there for good; None if it never does."""
    known = [(t, v) for t, v in zip(steps, values, strict=True) if v is not None]

    last_below = max((i for i, (_, v) in enumerate(known) if v < level), default=-1)
    return float(known[last_below + 1][0]) if last_below + 1 < len(known) else None
