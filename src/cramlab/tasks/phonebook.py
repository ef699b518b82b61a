"""A phone book: names of several tokens with a number each fill the context, and the end asks for one of them.

One short sequence (N = 14, names of two letters)::

    position   0    1    2    3    4    5    6    7    8    9    10   11   12   13
    token      -    -    l4   l1   n7   l4   l2   n3   l1   l1   n7   ?    l4   l2
    answer     .    .    .    .    .    .    .    .    .    .    .    .    .    n3

Token 0, `-`, fills what no entry fits into, token 1 asks. Names are different, letters and numbers are not. A model
trained at one `seq_len` can be tested at longer ones (`training.test_seq_lens`). Source: ours, after the phone book of
Jelassi et al. (arXiv 2402.01032); differs: a number is one token.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask

NOTHING, ASK = range(2)


@checked("task")
class PhonebookConfig(RecallTask):
    """A phone book.

    Attributes:
        seq_len: tokens per sequence.
        n_letters: letters of a name.
        alphabet: number of different letters.
        vocab_size: number of tokens: two marks, letters, and the rest are numbers.
    """

    stream = 211
    seq_len: Size = 256
    n_letters: Annotated[int, Field(ge=1, le=8)] = 3
    alphabet: Size = 32
    vocab_size: Size = 256

    def __post_init__(self) -> None:
        """Raises ConfigError when the sequence has no room for two entries, or names or numbers are too few."""
        if self.vocab_size < self.alphabet + 4:
            raise ConfigError(f"task.vocab_size = {self.vocab_size} must be at least {self.alphabet + 4}, alphabet + 4")
        if self.n_entries < 2:
            shortest = 3 * self.n_letters + 3
            raise ConfigError(f"task.seq_len = {self.seq_len} must be at least {shortest}: two entries and a question")
        if self.n_entries > self.alphabet**self.n_letters:
            raise ConfigError(
                f"task.alphabet = {self.alphabet} makes {self.alphabet**self.n_letters} names of {self.n_letters} "
                f"letters, fewer than the {self.n_entries} entries; raise one of them"
            )

    @property
    def n_entries(self) -> int:
        """Entries of a sequence."""
        return (self.seq_len - 1 - self.n_letters) // (self.n_letters + 1)

    @property
    def asked_per_sequence(self) -> int:
        """The last token asks."""
        return 1

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        n, width = self.n_entries, self.n_letters + 1
        which = rng.choice(self.alphabet**self.n_letters, size=n, replace=False)
        letters = which[:, None] // self.alphabet ** np.arange(self.n_letters) % self.alphabet
        numbers = rng.integers(2 + self.alphabet, self.vocab_size, size=n)
        tokens, answers = np.full(self.seq_len, NOTHING), np.full(self.seq_len, -1)
        tokens[-width - n * width : -width] = np.column_stack([2 + letters, numbers]).ravel()
        asked = int(rng.integers(n))
        tokens[-width], tokens[1 - width :] = ASK, 2 + letters[asked]
        answers[-1] = numbers[asked]
        return Drawn(tokens, answers)

    def oracle(self, batch: Batch) -> Predictions:
        """Compares the whole name with every entry."""
        return self._answer(batch, self.n_letters)

    def floor(self, batch: Batch) -> Predictions:
        """Compares the last letter alone, and takes the first entry that has it."""
        return self._answer(batch, 1)

    def _answer(self, batch: Batch, n_compared: int) -> Predictions:
        tokens, width = batch.discrete[..., 0], self.n_letters + 1
        entries = tokens[:, -width - self.n_entries * width : -width].unflatten(1, (self.n_entries, width))
        name = tokens[:, -self.n_letters :]
        same = (entries[..., :-1] == name[:, None])[..., -n_compared:].all(dim=-1)
        first = same.int().argmax(dim=1)
        number = entries[..., -1].gather(1, first[:, None])
        return self.answering(torch.where(tokens >= 0, number, 0))
