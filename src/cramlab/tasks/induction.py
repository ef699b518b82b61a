"""Induction after Olsson et al. (2022) and Mamba (arXiv 2312.00752): what followed the mark the first time?

One short sequence (N = 8)::

    position   0    1    2    3    4    5    6    7
    token      t4   t9   !    t6   t2   t4   t2   !
    answer     .    .    .    .    .    .    .    t6

Token 0 is the mark, `!`. It stands once at a random place and once at the end.
"""

from __future__ import annotations

import numpy as np

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask

MARK = 0


@checked("task")
class InductionConfig(RecallTask):
    """Induction.

    Attributes:
        seq_len: tokens per sequence.
        vocab_size: number of tokens, one of which is the mark.
    """

    stream = 209
    seq_len: Size = 64
    vocab_size: Size = 16

    def __post_init__(self) -> None:
        """Raises ConfigError when there is no room for two marks, or fewer than two other tokens."""
        if self.seq_len < 3:
            raise ConfigError(f"task.seq_len = {self.seq_len} must be at least 3: a mark, a token and a mark")
        if self.vocab_size < 3:
            raise ConfigError(f"task.vocab_size = {self.vocab_size} must be at least 3: the mark and two others")

    @property
    def asked_per_sequence(self) -> int:
        """The last token asks."""
        return 1

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        tokens, answers = rng.integers(1, self.vocab_size, size=self.seq_len), np.full(self.seq_len, -1)
        at = int(rng.integers(self.seq_len - 2))
        tokens[at] = tokens[-1] = MARK
        answers[-1] = tokens[at + 1]
        return Drawn(tokens, answers)

    def oracle(self, batch: Batch) -> Predictions:
        """Gives the token after the first mark."""
        tokens = batch.discrete[..., 0]
        after = (tokens == MARK).int().argmax(dim=1, keepdim=True) + 1
        return self.answering(tokens.gather(1, after).expand(-1, self.seq_len))

    def floor(self, batch: Batch) -> Predictions:
        """Repeats the token before the last mark."""
        return self.answering(batch.discrete[:, -2, :].expand(-1, self.seq_len))
