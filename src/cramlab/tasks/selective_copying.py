"""Selective copying after Mamba (Gu and Dao, arXiv 2312.00752): items among noise are repeated in order at the end.

One short sequence (N = 12, three items)::

    position   0    1    2    3    4    5    6    7    8    9    10   11
    token      .    d4   .    .    d9   .    d4   .    .    c    c    c
    answer     .    .    .    .    .    .    .    .    .    d4   d9   d4

Token 0 is noise, token 1, `c`, asks for the next item. The places of the items differ from sequence to sequence.
"""

from __future__ import annotations

import numpy as np
import torch

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Count, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask

NOISE, COPY = range(2)


@checked("task")
class SelectiveCopyingConfig(RecallTask):
    """Selective copying.

    Attributes:
        seq_len: tokens per sequence.
        n_items: items to be copied.
        vocab_size: number of tokens, two of which are noise and the request.
    """

    stream = 208
    seq_len: Size = 64
    n_items: Count = 8
    vocab_size: Size = 16

    def __post_init__(self) -> None:
        """Raises ConfigError when the items do not fit, or there are fewer than two different ones."""
        if 2 * self.n_items > self.seq_len:
            raise ConfigError(f"task.n_items = {self.n_items} must be at most half of seq_len = {self.seq_len}")
        if self.vocab_size < 4:
            raise ConfigError(f"task.vocab_size = {self.vocab_size} must be at least 4: noise, request and two items")

    @property
    def asked_per_sequence(self) -> int:
        """Every item is asked for once."""
        return self.n_items

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        n_before = self.seq_len - self.n_items
        items = rng.integers(2, self.vocab_size, size=self.n_items)
        tokens, answers = np.full(self.seq_len, NOISE), np.full(self.seq_len, -1)
        tokens[np.sort(rng.choice(n_before, size=self.n_items, replace=False))] = items
        tokens[n_before:], answers[n_before:] = COPY, items
        return Drawn(tokens, answers)

    def oracle(self, batch: Batch) -> Predictions:
        """Gives the items in order."""
        tokens = batch.discrete[..., 0]
        found = torch.zeros_like(tokens)
        found[:, -self.n_items :] = tokens[tokens > COPY].view(len(tokens), self.n_items)
        return self.answering(found)

    def floor(self, batch: Batch) -> Predictions:
        """Answers with the first item."""
        tokens = batch.discrete[..., 0]
        first = (tokens > COPY).int().argmax(dim=1, keepdim=True)
        return self.answering(tokens.gather(1, first).expand(-1, self.seq_len))
