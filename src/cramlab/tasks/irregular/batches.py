"""Irregular series as batches.

A token is a visit. Its inputs are, for every channel, the last known value (standardised; 0, the mean, before the
first), whether it was measured at this visit, and the time since it was measured; then the statics. The level is the
first channel's last known value; its next measured value is the forecast target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cramlab.batch import Batch
from cramlab.tasks.irregular.series import DataError, IrregularData, Series

VISITS_KEPT = 64  # a batch holds the last visits of longer series
_ROUNDING = 1e-12  # standard deviations below this share of the values are rounding errors


@dataclass(frozen=True)
class Scaling:
    """Means and standard deviations of channels (C,) and statics (S,), from the training split alone."""

    channel_mean: np.ndarray
    channel_std: np.ndarray
    static_mean: np.ndarray
    static_std: np.ndarray

    @classmethod
    def of(cls, series: Sequence[Series]) -> Scaling:
        """Computes them over all measured values.

        Raises:
            DataError: when there is no series.
        """
        if not series:
            raise DataError("series is empty; give at least one series")
        return cls(*_moments([s.values for s in series]), *_moments([s.statics[None] for s in series]))


def _moments(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    stacked = np.concatenate(parts)
    known = np.isfinite(stacked)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, stacked, 0.0).sum(axis=0) / n
    variance = np.where(known, (stacked - mean) ** 2, 0.0).sum(axis=0) / n
    constant = variance <= _ROUNDING**2 * (mean**2 + variance)  # in any unit
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def cut_off(series: Sequence[Series], *, most: int = VISITS_KEPT) -> dict[str, int]:
    """Counts the series with more than `most` visits, and their visits and labels that a batch leaves out."""
    longer = [one for one in series if len(one.times) > most]
    return {
        "n_series": len(longer),
        "n_visits": sum(len(one.times) - most for one in longer),
        "n_labels": sum(int((one.labels[:-most] >= 0).sum()) for one in longer),
    }


def collate(data: IrregularData, series: Sequence[Series], scaling: Scaling, *, most: int = VISITS_KEPT) -> Batch:
    """Stacks series into one batch, padded at the end; longer series keep their last `most` visits.

    Args:
        data: data set, which defines channels, classes and the unit of time.
        series: series to stack.
        scaling: means and standard deviations of the training split.
        most: largest number of visits per series.

    Raises:
        DataError: when there is no series, or channels or statics differ from those of the scaling.
    """
    if not series or most < 1:
        raise DataError(f"cannot stack {len(series)} series of at most {most} visits; give at least one of each")
    for one in series:
        if (one.values.shape[1], len(one.statics)) != (len(scaling.channel_mean), len(scaling.static_mean)):
            raise DataError(f'series of person "{one.person}" has different channels or statics from the scaling')
    kept = [_tokens(one, scaling, data.time_unit, most) for one in series]
    n_tokens = max(len(one["label"]) for one in kept)

    def stack(name: str, dtype: torch.dtype, fill: float = 0.0) -> torch.Tensor:
        shape = (len(kept), n_tokens, *kept[0][name].shape[1:])
        out = np.full(shape, fill)
        for row, one in zip(out, kept, strict=True):
            row[: len(one[name])] = one[name]
        return torch.from_numpy(out).to(dtype)

    label = stack("label", torch.int64, -1)
    valid = stack("valid", torch.bool)
    nowhere = torch.zeros_like(valid)
    return Batch(
        discrete=torch.zeros(*valid.shape, 0, dtype=torch.int64),
        continuous=stack("continuous", torch.float32),
        gaps=stack("gap", torch.float32),
        horizons=stack("horizon", torch.float32),
        valid=valid,
        dynamics_target=stack("next", torch.float32),
        dynamics_mask=stack("has_next", torch.bool),
        retrieval_target=label.clamp(min=0),
        retrieval_mask=label >= 0,
        slices={},
        oracle_reads=nowhere,
        pattern=torch.full(valid.shape, -1),
    )


def _tokens(one: Series, scaling: Scaling, time_unit: float, most: int) -> dict[str, np.ndarray]:
    """Returns the arrays of one series, (V, ...)."""
    values = (one.values - scaling.channel_mean) / scaling.channel_std
    measured = np.isfinite(values)
    places = np.where(measured, np.arange(len(values))[:, None], -1)
    last = np.maximum.accumulate(places, axis=0)
    known = np.where(last >= 0, np.take_along_axis(np.nan_to_num(values), np.maximum(last, 0), axis=0), 0.0)
    times = one.times / time_unit
    age = np.where(last >= 0, times[:, None] - times[np.maximum(last, 0)], 0.0)
    statics = (one.statics - scaling.static_mean) / scaling.static_std
    person = np.concatenate([np.nan_to_num(statics), np.isfinite(statics)])
    gap = np.diff(times, prepend=times[0])
    following = measured[1:, 0]
    continuous = np.concatenate(
        [known[:, :1], known, measured, np.log1p(age), np.tile(person, (len(values), 1))], axis=1
    )
    tokens = {
        "continuous": continuous,
        "gap": gap,
        "horizon": np.append(gap[1:], 0.0),
        "next": np.append(np.nan_to_num(values[1:, 0]), 0.0),
        "has_next": np.append(following & (last[:-1, 0] >= 0), False),
        "label": one.labels,
        "valid": np.ones(len(values), dtype=bool),
    }
    return {name: array[-most:] for name, array in tokens.items()}
