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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cramlab.batch import Batch, InputSpec
from cramlab.config import ConfigError

SPLIT_SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Series:
    """One person.

    Attributes:
        person: whose it is; all series of a person go to one split.
        times: of the visits, (V,), increasing or equal, in the unit of the data set.
        values: (V, C); NaN where not measured.
        statics: known from the beginning, (S,); NaN where unknown.
        labels: class to be predicted at a visit, (V,); -1: none.
    """

    person: str
    times: np.ndarray
    values: np.ndarray
    statics: np.ndarray
    labels: np.ndarray


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
    """

    name: str
    what: str
    channels: tuple[str, ...]
    statics: tuple[str, ...]
    n_classes: int
    time_unit: float
    series: tuple[Series, ...]
    origin: str

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
        """Over all measured values."""
        return cls(*_moments([s.values for s in series]), *_moments([s.statics[None] for s in series]))


def _moments(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    stacked = np.concatenate(parts)
    known = np.isfinite(stacked)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, stacked, 0.0).sum(axis=0) / n
    variance = np.where(known, (stacked - mean) ** 2, 0.0).sum(axis=0) / n
    return mean, np.where(variance > 1e-12, np.sqrt(variance), 1.0)


def split_people(series: Sequence[Series], seed: int) -> dict[str, list[Series]]:
    """Train, validation and test, by person, with the same share of the rarest label in each.

    Raises:
        ConfigError: when there are too few people for three splits.
    """
    people: dict[str, list[Series]] = {}
    for one in series:
        people.setdefault(one.person, []).append(one)
    if len(people) < 5:
        raise ConfigError(f"{len(people)} people are too few for three splits; give at least 5")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(303,)))
    strata: dict[int, list[str]] = {}
    for person in sorted(people):
        strata.setdefault(max(int(one.labels.max()) for one in people[person]), []).append(person)
    ranked = []
    for names in strata.values():
        order = rng.permutation(len(names))
        ranked += [((rank + 0.5) / len(names), names[i]) for rank, i in enumerate(order)]
    ends = np.cumsum(SPLIT_SHARES)
    found: dict[str, list[Series]] = {"train": [], "validation": [], "test": []}
    for place, person in sorted(ranked):
        name = list(found)[int(np.searchsorted(ends[:-1], place, side="right"))]
        found[name] += people[person]
    if empty := [name for name, some in found.items() if not some]:
        raise ConfigError(
            f"{len(people)} people of {len(strata)} kinds leave no one for {' and '.join(empty)}; give more people"
        )
    return found


def collate(data: IrregularData, series: Sequence[Series], scaling: Scaling, *, most: int = 64) -> Batch:
    """Series as one batch, padded at the end; of longer ones the last `most` visits.

    Args:
        data: for channels, classes and the unit of time.
        series: to be stacked.
        scaling: of the training split.
        most: visits kept of a series.
    """
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
