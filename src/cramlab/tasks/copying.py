"""Synthetic copying, in the words of SRCD: values are written in a row and asked for in the same order.

One sequence, drawn small (N = 8)::

    position   0     1     2     3     4     5     6     7
    kind       write write write write query query query query
    key        p0    p1    p2    p3    p0    p1    p2    p3
    value      31    8     55    2     .     .     .     .
    answer     .     .     .     .     31    8     55    2

The keys are codes of places, the same in every sequence; the values are drawn anew, so that nothing can be learned by
heart: every query has to be looked up. Inputs and answers have SRCD's shape, so that a model can be carried over.
"""

from __future__ import annotations

import functools

import numpy as np

from cramlab.batch import Batch
from cramlab.config import ConfigError, Share, checked
from cramlab.tasks.srcd import QUERY, SPLITS, WRITE, Split, SRCDConfig, SRCDDataset, collate, sample

_CODE_STREAM, _VALUE_STREAM = 202, 203  # spawn keys: of the places' codes, of the values


@checked("task")
class CopyingConfig(SRCDConfig):
    """SRCD's level, gaps and channels; half of the tokens write, the other half asks.

    Attributes:
        query_frac: always one half.
        write_frac: always one half.
        recurring_frac: always 0: a key comes again, its value does not.
    """

    query_frac: Share = 0.5
    write_frac: Share = 0.5
    recurring_frac: Share = 0.0

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        super().__post_init__()
        if self.key_mode != "vector":
            raise ConfigError(f'task.key_mode = "{self.key_mode}" is not for copying; give "vector"')
        if self.seq_len % 2:
            raise ConfigError(f"task.seq_len = {self.seq_len} is odd; copying needs two halves")

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> CopyingDataset:
        """See `SRCDConfig.dataset`."""
        return CopyingDataset(self, seed=seed, split=split, batch_size=batch_size, start=start)


@functools.lru_cache(maxsize=16)
def place_codes(n_places: int, key_dim: int) -> np.ndarray:
    """Unit vectors, one a place, (n_places, key_dim); the same for all seeds and lengths."""
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_CODE_STREAM,)))
    codes = rng.standard_normal((n_places, key_dim))
    return codes / np.linalg.norm(codes, axis=-1, keepdims=True)


def sample_copy(config: CopyingConfig, *, seed: int, split: Split, index: int) -> dict[str, np.ndarray]:
    """One sequence, a function of its arguments alone; the arrays of `srcd.sample`."""
    out = sample(config, seed=seed, split=split, index=index)  # for the level and the gaps
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_VALUE_STREAM, SPLITS.index(split), index)))
    half = config.seq_len // 2
    values = rng.integers(config.n_values, size=half)
    nothing = np.full(half, config.n_values)
    asked = np.arange(config.seq_len) >= half
    noise = config.key_noise * rng.standard_normal((config.seq_len, config.key_dim))
    return out | {
        "kind": np.where(asked, QUERY, WRITE),
        "value": np.concatenate([values, nothing]),
        "key": np.tile(place_codes(half, config.key_dim), (2, 1)) + noise,
        "answer": np.concatenate([np.full(half, -1), values]),
        "write_position": np.where(asked, np.arange(config.seq_len) - half, -1),
        "pattern": np.full(config.seq_len, -1),
        "novel": asked,
        "recurring": np.zeros_like(asked),
        "rebound": np.zeros_like(asked),
    }


class CopyingDataset(SRCDDataset):
    """An endless, restartable stream of batches; see `SRCDDataset`."""

    def __init__(self, config: CopyingConfig, *, seed: int, split: Split, batch_size: int, start: int = 0) -> None:
        super().__init__(config, seed=seed, split=split, batch_size=batch_size, start=start)
        self.copying = config

    def batch(self, index: int) -> Batch:
        """The batch whose first sequence is number `index` of the split."""
        indices = range(index, index + self.batch_size)
        return collate(
            self.copying, [sample_copy(self.copying, seed=self.seed, split=self.split, index=i) for i in indices]
        )
