"""The part that all recall tasks share: one channel of tokens, answers at some of them, and nothing to memorise.

A recall task draws the tokens and answers of one sequence; `RecallTask` makes batches of them. Whatever a query asks
for is drawn anew for each sequence, so every query must attend and no other token must.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.batch import Batch, InputSpec, Predictions
from cramlab.tasks.task import SPLITS, BatchStream, Split


class Drawn(NamedTuple):
    """One sequence.

    Attributes:
        tokens: int64 (seq_len,).
        answers: the answer at each query, -1 at all other tokens, int64 (seq_len,).
        slices: named subsets of the queries, bool (seq_len,), besides "novel", which holds them all.
    """

    tokens: np.ndarray
    answers: np.ndarray
    slices: Mapping[str, np.ndarray] = {}


class RecallTask(ABC):
    """A task of one channel of tokens whose answers are tokens; see `cramlab.tasks.task.Task`.

    Attributes:
        stream: number of the task's generator, so that two tasks with one seed draw different numbers.
        seq_len: tokens per sequence.
        vocab_size: number of tokens.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    stream: ClassVar[int]
    seq_len: int
    vocab_size: int

    @property
    def n_patterns(self) -> int:
        """No binding recurs; `Batch.pattern` is -1 everywhere."""
        return 1

    @property
    def input_spec(self) -> InputSpec:
        """One channel of tokens; the real channel, which would be a level, is 0."""
        return InputSpec(vocab_sizes=(self.vocab_size,), n_continuous=1, n_classes=self.vocab_size)

    @property
    def dynamics_floor(self) -> float:
        """There are no levels."""
        return 0.0

    @property
    @abstractmethod
    def asked_per_sequence(self) -> int:
        """Number of queries in a sequence."""

    @property
    def expected_attention_frac(self) -> float:
        """Every query must attend, and nothing else."""
        return self.asked_per_sequence / self.seq_len

    @abstractmethod
    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Draws one sequence."""

    @abstractmethod
    def oracle(self, batch: Batch) -> Predictions:
        """Answers from the inputs alone, always correctly."""

    @abstractmethod
    def floor(self, batch: Batch) -> Predictions:
        """Answers without looking up what is asked for."""

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices of a split as one batch."""
        keys = [(self.stream, SPLITS.index(split), index) for index in indices]
        drawn = [self.sequence(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))) for key in keys]
        tokens = torch.from_numpy(np.stack([one.tokens for one in drawn]))
        answers = torch.from_numpy(np.stack([one.answers for one in drawn]))
        slices = {name: torch.from_numpy(np.stack([one.slices[name] for one in drawn])) for name in drawn[0].slices}
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
            slices={"novel": asked, **slices},
            oracle_reads=asked,
            pattern=torch.full_like(answers, -1),
        )

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> BatchStream:
        """Returns the endless stream of batches."""
        return BatchStream(self, seed=seed, split=split, batch_size=batch_size, start=start)

    def answering(self, answers: Tensor) -> Predictions:
        """Predictions of whoever is sure of these answers, int64 (B, T)."""
        return Predictions(level=torch.zeros(answers.shape), logits=F.one_hot(answers, self.vocab_size).float())


def filler(rng: np.random.Generator, size: int, low: int, high: int, live: np.ndarray) -> np.ndarray:
    """Draws tokens from low to high - 1 that are none of `live`, int64 (size,)."""
    tokens = rng.integers(low, high, size=size)
    while (bad := np.isin(tokens, live)).any():
        tokens[bad] = rng.integers(low, high, size=int(bad.sum()))
    return tokens


def spread(rng: np.random.Generator, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Draws the first positions of events of these lengths, in order and without overlap, uniformly; int64 (n,)."""
    free = seq_len - int(lengths.sum())
    before = np.sort(rng.integers(free + 1, size=len(lengths)))
    return before + np.concatenate([[0], np.cumsum(lengths)[:-1]])
