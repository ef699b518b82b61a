"""Compositional recall: a key is two tokens, each of which occurs in several keys, so neither alone is enough.

One short sequence (N = 20, two first parts and two second parts)::

    position   0    1    2    3    4    5    6    7    8    9    10   11   12   13   14   15   16
    token      a3   b7   v2   a5   b7   v9   a3   b8   v4   a5   b8   v1   .    a5   b7   .    .
    answer     .    .    .    .    .    .    .    .    .    .    .    .    .    .    v9   .    .

All combinations are bound, in random order. First parts are tokens of the first quarter of the vocabulary, second
parts of the second quarter, values of the second half. Filler is never a part of a key of the sequence.
Source: ours, after the MQAR of zoology.
"""

from __future__ import annotations

import numpy as np
import torch

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Count, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask, filler, spread


@checked("task")
class CompositionalConfig(RecallTask):
    """Compositional recall.

    Attributes:
        seq_len: tokens per sequence.
        n_parts: first parts, and as many second parts; each of their `n_parts ** 2` combinations has a value.
        n_queries: queries, each for another combination.
        vocab_size: number of tokens; token 0 is not used.
    """

    stream = 210
    seq_len: Size = 64
    n_parts: Count = 2
    n_queries: Count = 4
    vocab_size: Size = 1024

    def __post_init__(self) -> None:
        """Raises ConfigError when keys and queries fit neither the sequence nor the vocabulary."""
        n_keys = self.n_parts**2
        if self.n_queries > n_keys:
            raise ConfigError(f"task.n_queries = {self.n_queries} must be at most n_parts ** 2 = {n_keys}")
        if (n := 3 * n_keys + 2 * self.n_queries) > self.seq_len:
            raise ConfigError(f"task.seq_len = {self.seq_len} does not hold the {n} tokens of keys and queries")
        if self.n_parts >= self.vocab_size // 4 - 1:
            raise ConfigError(f"task.n_parts = {self.n_parts} needs a vocab_size above {4 * self.n_parts + 7}")

    @property
    def asked_per_sequence(self) -> int:
        """Every query must attend, at its second token."""
        return self.n_queries

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        quarter, half, n = self.vocab_size // 4, self.vocab_size // 2, self.n_parts
        first = 1 + rng.choice(quarter - 1, size=n, replace=False)
        second = quarter + rng.choice(half - quarter, size=n, replace=False)
        keys = rng.permutation(np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2))
        values = half + rng.integers(self.vocab_size - half, size=len(keys))
        n_bound = 3 * len(keys)
        tokens = filler(rng, self.seq_len, 1, self.vocab_size, np.concatenate([first, second]))
        tokens[:n_bound] = np.column_stack([keys, values]).ravel()
        answers = np.full(self.seq_len, -1)
        starts = n_bound + spread(rng, np.full(self.n_queries, 2), self.seq_len - n_bound)
        asked = rng.choice(len(keys), size=self.n_queries, replace=False)
        tokens[starts], tokens[starts + 1] = keys[asked].T
        answers[starts + 1] = values[asked]
        return Drawn(tokens, answers)

    def oracle(self, batch: Batch) -> Predictions:
        """Looks every token with the one before it up among the keys."""
        return self._answer(batch, both=True)

    def floor(self, batch: Batch) -> Predictions:
        """Looks the second part alone up, which is right once in `n_parts` queries."""
        return self._answer(batch, both=False)

    def _answer(self, batch: Batch, *, both: bool) -> Predictions:
        tokens, n = batch.discrete[..., 0], 3 * self.n_parts**2
        match = tokens[:, :, None] == tokens[:, None, 1:n:3]
        if both:
            before = torch.roll(tokens, 1, dims=1)
            match = match & (before[:, :, None] == tokens[:, None, 0:n:3])
        return self.answering(tokens[:, 2:n:3].gather(1, match.int().argmax(dim=-1)))
