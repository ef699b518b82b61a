"""Irregular series as data, and as batches of the shape that every model takes.

One series, drawn small (`.` was not measured)::

    day         0     31    400   410
    bilirubin   1.4   .     2.1   2.0
    albumin     4.1   3.9   .     3.2
    label       .     .     .     1

A token is a visit. Its inputs are, for every channel, the last known value (standardised; 0, the mean, before the
first), whether it was measured now, and how long ago it was; then what is known of the person from the beginning. The
level is the first channel's last known value; the next one to be measured is to be forecast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cramlab.batch import Batch, InputSpec
from cramlab.config import ConfigError

VISITS_KEPT = 64  # of a series, in a batch: the last ones
LARGEST = 1e30  # of values and times, so that sums of squares stay finite

_ROUNDING = 1e-12  # deviations below this share of the values are none


class DataError(ConfigError):
    """Data that are missing or not what they should be; the message names where, what was expected and found."""


@dataclass(frozen=True)
class Series:
    """One person.

    Attributes:
        person: whose it is; all series of a person go to one split.
        times: of the visits, (V,), increasing or equal, in the unit of the data set.
        values: (V, C); NaN where not measured.
        statics: known from the beginning, (S,); NaN where unknown.
        labels: class to be predicted at a visit, whole numbers, (V,); -1: none.

    Raises:
        DataError: when a field is not of that shape and kind, a time is missing or decreases, or a number is infinite.
    """

    person: str
    times: np.ndarray
    values: np.ndarray
    statics: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not isinstance(self.person, str) or not self.person or self.person != self.person.strip():
            raise DataError(f"series.person = {self.person!r}; give a text that is not empty, without blanks around it")
        for name, dimensions in (("times", 1), ("values", 2), ("statics", 1), ("labels", 1)):
            self._check_array(name, dimensions)
        n_visits = len(self.times)
        if not n_visits:
            raise self._error("times", "is empty; give at least one visit")
        for name in ("values", "labels"):
            if (n := len(getattr(self, name))) != n_visits:
                raise self._error(name, f"has {n} rows; give one for each of the {n_visits} times")
        if np.isnan(self.times).any():
            raise self._error("times", f"is NaN at visit {int(np.isnan(self.times).argmax())}; leave that visit out")
        if (falls := np.flatnonzero(np.diff(self.times) < 0)).size:
            at = int(falls[0]) + 1
            raise self._error("times", f"falls at visit {at} ({self.times[at - 1]} to {self.times[at]}); sort by time")
        if (self.labels < -1).any():
            raise self._error("labels", f"holds {self.labels.min()}; give classes from 0, or -1 for none")

    def _check_array(self, name: str, dimensions: int) -> None:
        array, kinds = getattr(self, name), "iu" if name == "labels" else "fiu"
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.ndim != dimensions:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            kind = "whole numbers" if name == "labels" else "numbers"
            raise self._error(name, f"is {found}; give a NumPy array of {kind} of {dimensions} dimensions")
        if (np.abs(array) > LARGEST).any():
            raise self._error(
                name, f"holds {array[np.abs(array) > LARGEST][0]}; give at most {LARGEST:g}, NaN if unknown"
            )

    def _error(self, name: str, what: str) -> DataError:
        return DataError(f'series.{name} of person "{self.person}" {what}')


@dataclass(frozen=True, kw_only=True)
class IrregularData:
    """A data set.

    Attributes:
        name: in the catalog of sources.
        what: the label, in words.
        channels: names of the measured values; the first is forecast.
        statics: names of what is known from the beginning.
        n_classes: of the label.
        time_unit: units of `Series.times` in one unit of gaps that models see.
        series: all of them.
        origin: where they come from, with version or hash.
        notes: what whoever made it from tables left out or had to decide, in words and numbers.

    Raises:
        DataError: when a series does not fit channels, statics or classes, or is there twice.
    """

    name: str
    what: str
    channels: tuple[str, ...]
    statics: tuple[str, ...]
    n_classes: int
    time_unit: float
    series: tuple[Series, ...]
    origin: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        for name in ("channels", "statics"):
            names = getattr(self, name)
            if not isinstance(names, tuple) or len(set(names)) < len(names):
                raise DataError(f"data.{name} = {names!r}; give a tuple of names that differ")
        if not self.channels:
            raise DataError("data.channels = () names nothing that is measured; give at least one channel")
        if isinstance(self.n_classes, bool) or not isinstance(self.n_classes, (int, np.integer)) or self.n_classes < 2:
            raise DataError(f"data.n_classes = {self.n_classes!r}; give a whole number from 2")
        if not (isinstance(self.time_unit, (int, float)) and math.isfinite(self.time_unit) and self.time_unit > 0):
            raise DataError(f"data.time_unit = {self.time_unit!r}; give a positive number")
        if not isinstance(self.series, tuple) or not all(isinstance(one, Series) for one in self.series):
            raise DataError(f"data.series is {type(self.series).__name__}; give a tuple of Series")
        seen: dict[tuple[str, bytes], int] = {}
        for i, one in enumerate(self.series):
            for name, held, wanted in (
                ("values", one.values.shape[1], len(self.channels)),
                ("statics", len(one.statics), len(self.statics)),
            ):
                if held != wanted:
                    raise DataError(
                        f'series.{name} of person "{one.person}" has {held} columns; the data name {wanted}'
                    )
            if one.labels.max() >= self.n_classes:
                raise DataError(
                    f'series.labels of person "{one.person}" holds {one.labels.max()}; '
                    f"data.n_classes = {self.n_classes}, so give classes up to {self.n_classes - 1}"
                )
            numbers = b"".join(array.tobytes() for array in (one.times, one.values, one.labels))
            first = seen.setdefault((one.person, numbers), i)
            # Two stays may agree in a single value by chance, but hardly in more.
            if first != i and np.isfinite(one.values).sum() > 2:
                raise DataError(f'series {first} and {i}, both of person "{one.person}", are the same; keep one')

    def digest(self) -> str:
        """SHA-256 over all that figures can depend on: names, classes, unit of time and every number."""
        head = (self.channels, self.statics, self.n_classes, float(self.time_unit))
        found = hashlib.sha256(repr(head).encode())
        for one in self.series:
            found.update(repr((one.person, one.values.shape)).encode())
            for array in (one.times, one.values, one.statics):
                found.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
            found.update(np.ascontiguousarray(one.labels, dtype="<i8").tobytes())
        return found.hexdigest()

    @property
    def input_spec(self) -> InputSpec:
        """Level; value, mask and age of each channel; statics and whether they are known."""
        return InputSpec(
            vocab_sizes=(),
            n_continuous=1 + 3 * len(self.channels) + 2 * len(self.statics),
            n_classes=self.n_classes,
        )


@dataclass(frozen=True)
class Scaling:
    """Means and standard deviations of channels and statics, of the training people alone."""

    channel_mean: np.ndarray
    channel_std: np.ndarray
    static_mean: np.ndarray
    static_std: np.ndarray

    @classmethod
    def of(cls, series: Sequence[Series]) -> Scaling:
        """Over all measured values.

        Raises:
            DataError: without any series.
        """
        if not series:
            raise DataError("means and deviations need at least one series; found none")
        return cls(*_moments([s.values for s in series]), *_moments([s.statics[None] for s in series]))


def _moments(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    stacked = np.concatenate(parts)
    known = np.isfinite(stacked)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, stacked, 0.0).sum(axis=0) / n
    variance = np.where(known, (stacked - mean) ** 2, 0.0).sum(axis=0) / n
    constant = variance <= _ROUNDING**2 * (mean**2 + variance)  # whatever the unit
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def cut_off(series: Sequence[Series], *, most: int = VISITS_KEPT) -> dict[str, int]:
    """What a batch does not hold of series of more than `most` visits: how many series, visits and labels."""
    longer = [one for one in series if len(one.times) > most]
    return {
        "n_series": len(longer),
        "n_visits": sum(len(one.times) - most for one in longer),
        "n_labels": sum(int((one.labels[:-most] >= 0).sum()) for one in longer),
    }


def collate(data: IrregularData, series: Sequence[Series], scaling: Scaling, *, most: int = VISITS_KEPT) -> Batch:
    """Series as one batch, padded at the end; of longer ones the last `most` visits.

    Args:
        data: for channels, classes and the unit of time.
        series: to be stacked.
        scaling: of the training split.
        most: visits kept of a series.

    Raises:
        DataError: without any series, or when they have other channels or statics than the scaling.
    """
    if not series or most < 1:
        raise DataError(f"{len(series)} series of at most {most} visits make no batch; give at least one of each")
    for one in series:
        if (one.values.shape[1], len(one.statics)) != (len(scaling.channel_mean), len(scaling.static_mean)):
            raise DataError(f'series of person "{one.person}" has other channels or statics than the scaling')
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
    """The arrays of one series, (V, ...)."""
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
