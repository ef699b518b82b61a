"""Multi-query associative recall (MQAR) after zoology (Arora et al. 2023): pairs first, then queries among filler.

One short sequence (N = 12, two pairs)::

    position   0    1    2    3    4    5    6    7    8    9    10   11
    token      k7   v2   k3   v9   .    k3   .    .    .    .    k7   .
    answer     .    .    .    .    .    v9   .    .    .    .    v2   .

Keys are tokens of the first half of the vocabulary, values of the second. Pairs are drawn for each sequence, so
nothing can be memorised and every query must attend. Filler, `.`, is any token but the keys of the sequence, and
queries prefer small distances by a power law, as in zoology. Differs: no filler is ever a key of the sequence, since
that would be a query without an answer.
"""

from __future__ import annotations

import numpy as np

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Positive, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask, filler


@checked("task")
class MQARConfig(RecallTask):
    """Multi-query associative recall.

    Attributes:
        seq_len: tokens per sequence.
        n_pairs: pairs of a key and a value per sequence, each queried once.
        vocab_size: number of tokens; token 0 is not used.
        power: exponent of the law of the distance of a query; small values prefer small distances.
    """

    stream = 206
    seq_len: Size = 64
    n_pairs: Size = 4
    vocab_size: Size = 8192
    power: Positive = 0.01

    def __post_init__(self) -> None:
        """Raises ConfigError when the pairs fit neither the sequence nor the vocabulary."""
        if 4 * self.n_pairs > self.seq_len:
            raise ConfigError(f"task.n_pairs = {self.n_pairs} must be at most a quarter of seq_len = {self.seq_len}")
        if self.n_pairs >= self.vocab_size // 2 - 1:
            raise ConfigError(f"task.n_pairs = {self.n_pairs} needs a vocab_size above {2 * self.n_pairs + 3}")

    @property
    def asked_per_sequence(self) -> int:
        """Every pair is asked for once."""
        return self.n_pairs

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        n, half = self.n_pairs, self.vocab_size // 2
        keys = 1 + rng.choice(half - 1, size=n, replace=False)
        values = half + rng.integers(self.vocab_size - half, size=n)
        tokens = filler(rng, self.seq_len, 1, self.vocab_size, keys)
        tokens[: 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
        places = (self.seq_len - 2 * n) // 2
        law = np.arange(1, places + 1) ** (self.power - 1.0)
        at = 2 * n + 2 * rng.choice(places, size=n, replace=False, p=law / law.sum())
        answers = np.full(self.seq_len, -1)
        tokens[at], answers[at] = keys, values
        return Drawn(tokens, answers)

    def oracle(self, batch: Batch) -> Predictions:
        """Looks every token up among the keys of the pairs."""
        tokens, n = batch.discrete[..., 0], 2 * self.n_pairs
        which = (tokens[:, :, None] == tokens[:, None, :n:2]).int().argmax(dim=-1)
        return self.answering(tokens[:, 1:n:2].gather(1, which))

    def floor(self, batch: Batch) -> Predictions:
        """Guesses the value of the last pair."""
        return self.answering(batch.discrete[:, 2 * self.n_pairs - 1, :1].expand(-1, self.seq_len))
