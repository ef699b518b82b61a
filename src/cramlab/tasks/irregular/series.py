"""Irregular series: the visits of one person, and a data set of them.

One short series (`.` was not measured)::

    day         0     31    400   410
    bilirubin   1.4   .     2.1   2.0
    albumin     4.1   3.9   .     3.2
    label       .     .     .     1
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from cramlab.batch import InputSpec
from cramlab.config import ConfigError

LARGEST = 1e30  # bound on values and times, which keeps sums of squares finite


class DataError(ConfigError):
    """Data are missing or invalid; the message says where, what was expected and what was found."""


@dataclass(frozen=True)
class Series:
    """The visits of one person.

    Attributes:
        person: name of the person; all series of a person go to one split.
        times: times of the visits (V,), not decreasing, in the time unit of the data set.
        values: measured values (V, C); NaN where not measured.
        statics: facts known before the first visit (S,); NaN where unknown.
        labels: class to predict at a visit, integers (V,); -1: none.

    Raises:
        DataError: when a field has another shape or type, a time is missing or decreases, or a number is infinite.
    """

    person: str
    times: np.ndarray
    values: np.ndarray
    statics: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not isinstance(self.person, str) or not self.person or self.person != self.person.strip():
            raise DataError(f"series.person = {self.person!r}; give a name without surrounding blanks")
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
        name: name of the data set, a key of `SOURCES`.
        what: description of the label.
        channels: names of the measured values; the first one is forecast.
        statics: names of the facts known before the first visit.
        n_classes: number of classes of the label.
        time_unit: number of units of `Series.times` in one unit of the gaps that models see.
        series: the series.
        origin: source of the data, with version or hash.
        notes: sentences on what was left out or replaced when the tables were read.

    Raises:
        DataError: when a series does not match channels, statics or classes, or occurs twice.
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
                raise DataError(f"data.{name} = {names!r}; give a tuple of different names")
        if not self.channels:
            raise DataError("data.channels is empty; give at least one channel")
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
                        f'series.{name} of person "{one.person}" has {held} columns, but the data set names {wanted}'
                    )
            if one.labels.max() >= self.n_classes:
                raise DataError(
                    f'series.labels of person "{one.person}" holds {one.labels.max()}; '
                    f"data.n_classes = {self.n_classes}, so give classes up to {self.n_classes - 1}"
                )
            numbers = b"".join(array.tobytes() for array in (one.times, one.values, one.labels))
            first = seen.setdefault((one.person, numbers), i)
            # Two stays can agree in one or two values by chance, but hardly in more.
            if first != i and np.isfinite(one.values).sum() > 2:
                raise DataError(f'series {first} and {i}, both of person "{one.person}", are equal; keep one')

    def digest(self) -> str:
        """Returns the SHA-256 of all that results depend on: names, classes, time unit and every number."""
        head = (self.channels, self.statics, self.n_classes, float(self.time_unit))
        sha = hashlib.sha256(repr(head).encode())
        for one in self.series:
            sha.update(repr((one.person, one.values.shape)).encode())
            for array in (one.times, one.values, one.statics):
                sha.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
            sha.update(np.ascontiguousarray(one.labels, dtype="<i8").tobytes())
        return sha.hexdigest()

    @property
    def input_spec(self) -> InputSpec:
        """Continuous channels: level; value, mask and age of each channel; statics and whether each is known."""
        return InputSpec(
            vocab_sizes=(),
            n_continuous=1 + 3 * len(self.channels) + 2 * len(self.statics),
            n_classes=self.n_classes,
        )
