"""Variable tracking after RULER (Hsieh et al., arXiv 2404.06654): a value is passed from variable to variable.

One short sequence (N = 16, two chains of one hop)::

    position   0    1    2    3    4    5    6    7    8    9    10   11   12   13   14   15
    token      x4   v9   .    x7   v2   x1   x4   .    .    x5   x7   .    .    .    ?    x1
    answer     .    .    .    .    .    .    .    .    .    .    .    .    .    .    .    v9

A statement is two tokens: the variable, then its value or the variable that it copies. Token 0 is filler, token 1 asks.
The end asks for the last variable of one chain; with `n_hops` hops that takes `n_hops` lookups after the first, so one
layer that reads once at the end is not enough. Differs from RULER: the answer is the value, not the variables' names.
"""

from __future__ import annotations

import numpy as np
import torch

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Count, CountOrZero, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask, spread

NOTHING, ASK = range(2)


@checked("task")
class VariableTrackingConfig(RecallTask):
    """Variable tracking.

    Attributes:
        seq_len: tokens per sequence.
        n_chains: chains of variables, each with a value of its own.
        n_hops: copies in a chain after the variable that has the value.
        vocab_size: number of tokens: two marks, variables in the first half, values in the second.
    """

    stream = 212
    seq_len: Size = 128
    n_chains: Count = 4
    n_hops: CountOrZero = 1
    vocab_size: Size = 128

    def __post_init__(self) -> None:
        """Raises ConfigError when statements do not fit, or there are too few variables."""
        n = self.n_chains * (1 + self.n_hops)
        if 2 * n + 2 > self.seq_len:
            raise ConfigError(f"task.seq_len = {self.seq_len} must be at least {2 * n + 2} for {n} statements")
        if self.vocab_size // 2 - 2 < n:
            raise ConfigError(f"task.vocab_size = {self.vocab_size} must be at least {2 * n + 4} for {n} variables")

    @property
    def asked_per_sequence(self) -> int:
        """The last token asks."""
        return 1

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        chains, length = self.n_chains, 1 + self.n_hops
        half = self.vocab_size // 2
        names = 2 + rng.choice(half - 2, size=(chains, length), replace=False)
        values = rng.integers(half, self.vocab_size, size=chains)
        turns = rng.permutation(np.repeat(np.arange(chains), length))
        tokens, answers = np.full(self.seq_len, NOTHING), np.full(self.seq_len, -1)
        said = np.zeros(chains, dtype=int)
        for chain, at in zip(turns, spread(rng, np.full(len(turns), 2), self.seq_len - 2), strict=True):
            link = said[chain]
            tokens[at : at + 2] = names[chain, link], names[chain, link - 1] if link else values[chain]
            said[chain] += 1
        asked = int(rng.integers(chains))
        tokens[-2:], answers[-1] = (ASK, names[asked, -1]), values[asked]
        return Drawn(tokens, answers)

    def oracle(self, batch: Batch) -> Predictions:
        """Follows the statements in order."""
        found = []
        for tokens in batch.discrete[..., 0].tolist():
            held: dict[int, int] = {}
            at = 0
            while tokens[at] != ASK:
                if tokens[at] == NOTHING:
                    at += 1
                    continue
                source: int = tokens[at + 1]
                held[tokens[at]] = held.get(source, source)
                at += 2
            found.append(held.get(tokens[-1], NOTHING))
        return self._everywhere(torch.tensor(found))

    def floor(self, batch: Batch) -> Predictions:
        """Answers with the first value."""
        tokens = batch.discrete[..., 0]
        first = (tokens >= self.vocab_size // 2).int().argmax(dim=1, keepdim=True)
        return self._everywhere(tokens.gather(1, first)[:, 0])

    def _everywhere(self, answers: torch.Tensor) -> Predictions:
        return self.answering(answers[:, None].expand(-1, self.seq_len))
