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
import torch
from torch.nn import functional as F

from cramlab.batch import Batch, InputSpec, Predictions
from cramlab.config import ConfigError, Positive, Size, checked
from cramlab.tasks.task import SPLITS, BatchStream, Split

_STREAM = 206  # spawn key of the generator that draws a sequence


@checked("task")
class MQARConfig:
    """Multi-query associative recall.

    Attributes:
        seq_len: tokens per sequence.
        n_pairs: pairs of a key and a value per sequence, each queried once.
        vocab_size: number of tokens; token 0 is not used.
        power: exponent of the law of the distance of a query; small values prefer small distances.
        n_patterns: not used, because no pair recurs.
    """

    seq_len: Size = 64
    n_pairs: Size = 4
    vocab_size: Size = 8192
    power: Positive = 0.01
    n_patterns: Size = 1

    def __post_init__(self) -> None:
        """Raises ConfigError when the pairs fit neither the sequence nor the vocabulary."""
        if 4 * self.n_pairs > self.seq_len:
            raise ConfigError(f"task.n_pairs = {self.n_pairs} must be at most a quarter of seq_len = {self.seq_len}")
        if self.n_pairs >= self.vocab_size // 2 - 1:
            raise ConfigError(f"task.n_pairs = {self.n_pairs} needs a vocab_size above {2 * self.n_pairs + 3}")

    @property
    def input_spec(self) -> InputSpec:
        """One channel of tokens; the real channel, which would be a level, is 0."""
        return InputSpec(vocab_sizes=(self.vocab_size,), n_continuous=1, n_classes=self.vocab_size)

    @property
    def dynamics_floor(self) -> float:
        """There are no levels."""
        return 0.0

    @property
    def expected_attention_frac(self) -> float:
        """Every query must attend, and nothing else."""
        return self.n_pairs / self.seq_len

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices of a split as one batch."""
        drawn = [self._sequence(seed, split, index) for index in indices]
        tokens, answers = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        asked, zeros = answers >= 0, torch.zeros(tokens.shape)
        everywhere = torch.ones_like(asked)
        return Batch(
            discrete=tokens[..., None],
            continuous=zeros[..., None],
            gaps=zeros,
            horizons=zeros,
            valid=everywhere,
            dynamics_target=zeros,
            dynamics_mask=~everywhere,
            retrieval_target=answers.clamp(min=0),
            retrieval_mask=asked,
            slices={"novel": asked},
            oracle_reads=asked,
            pattern=torch.full_like(answers, -1),
        )

    def _sequence(self, seed: int, split: Split, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answers of one sequence, -1 where nothing is asked; both (seq_len,)."""
        key = (_STREAM, SPLITS.index(split), index)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        n, half = self.n_pairs, self.vocab_size // 2
        keys = 1 + rng.choice(half - 1, size=n, replace=False)
        values = half + rng.integers(self.vocab_size - half, size=n)
        tokens = 1 + rng.integers(self.vocab_size - 1, size=self.seq_len)
        while (live := np.isin(tokens, keys)).any():
            tokens[live] = 1 + rng.integers(self.vocab_size - 1, size=int(live.sum()))
        tokens[: 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
        places = (self.seq_len - 2 * n) // 2
        law = np.arange(1, places + 1) ** (self.power - 1.0)
        at = 2 * n + 2 * rng.choice(places, size=n, replace=False, p=law / law.sum())
        answers = np.full(self.seq_len, -1)
        tokens[at], answers[at] = keys, values
        return tokens, answers

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> BatchStream:
        """Returns the endless stream of batches."""
        return BatchStream(self, seed=seed, split=split, batch_size=batch_size, start=start)

    def oracle(self, batch: Batch) -> Predictions:
        """Looks every token up among the keys of the pairs."""
        tokens, n = batch.discrete[..., 0], 2 * self.n_pairs
        which = (tokens[:, :, None] == tokens[:, None, :n:2]).int().argmax(dim=-1)
        return self._answering(tokens[:, 1:n:2].gather(1, which))

    def floor(self, batch: Batch) -> Predictions:
        """Guesses the value of the last pair."""
        return self._answering(batch.discrete[:, 2 * self.n_pairs - 1, :1].expand(-1, self.seq_len))

    def _answering(self, answers: torch.Tensor) -> Predictions:
        logits = F.one_hot(answers, self.vocab_size).float()
        return Predictions(level=torch.zeros(answers.shape), logits=logits)
