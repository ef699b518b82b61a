"""Synthetic copying in SRCD's format: the first half writes values, the second half queries them in the same order.

One short sequence (N = 8)::

    position   0     1     2     3     4     5     6     7
    kind       write write write write query query query query
    key        p0    p1    p2    p3    p0    p1    p2    p3
    value      31    8     55    2     .     .     .     .
    answer     .     .     .     .     31    8     55    2

The keys encode positions and are the same in every sequence; the values differ, so nothing can be memorised and every
query needs attention. Inputs and answers have SRCD's shape, so that a trained model can be transferred.
"""

from __future__ import annotations

import functools

import numpy as np

from cramlab.batch import Batch
from cramlab.config import ConfigError, Share, checked
from cramlab.tasks.srcd import QUERY, WRITE, SRCDConfig, collate, sample
from cramlab.tasks.task import SPLITS, Split

_CODE_STREAM, _VALUE_STREAM = 202, 203  # spawn keys of the generators that draw position codes and values


@checked("task")
class CopyingConfig(SRCDConfig):
    """Level, gaps and channels are SRCD's; the first half of the tokens writes, the second half queries.

    Attributes:
        query_frac: always 0.5.
        write_frac: always 0.5.
        recurring_frac: always 0: keys recur, their values do not.
    """

    query_frac: Share = 0.5
    write_frac: Share = 0.5
    recurring_frac: Share = 0.0

    def __post_init__(self) -> None:
        """Raises ConfigError for vector-less keys and odd lengths."""
        super().__post_init__()
        if self.key_mode != "vector":
            raise ConfigError(f'task.key_mode = "{self.key_mode}" is not available for copying; give "vector"')
        if self.seq_len % 2:
            raise ConfigError(f"task.seq_len = {self.seq_len} is odd, but copying needs equal halves; make it even")

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices of a split as one batch."""
        return collate(self, [sample_copy(self, seed=seed, split=split, index=i) for i in indices])


@functools.lru_cache(maxsize=16)
def place_codes(n_places: int, key_dim: int) -> np.ndarray:
    """Returns one unit vector per position, (n_places, key_dim); the same for all seeds and lengths."""
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_CODE_STREAM,)))
    codes = rng.standard_normal((n_places, key_dim))
    return codes / np.linalg.norm(codes, axis=-1, keepdims=True)


def sample_copy(config: CopyingConfig, *, seed: int, split: Split, index: int) -> dict[str, np.ndarray]:
    """Draws one sequence with the arrays of `srcd.sample`. It depends on the arguments alone."""
    out = sample(config, seed=seed, split=split, index=index)  # provides level and gaps
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
