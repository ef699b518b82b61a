"""Associative recall in which keys get new values and are forgotten: only the newest event of a key counts.

One short sequence (N = 16, two keys; `=` binds, `!` forgets, `?` asks)::

    position   0    1    2    3    4    5    6    7    8    9    10   11   12   13   14   15
    token      =k7  v2   =k3  v9   .    =k7  v5   ?    k7   !    k3   .    ?    k3   .    .
    answer     .    .    .    .    .    .    .    .    v5   .    .    .    .    -    .    .

Token 0 is the answer where the key was forgotten, token 1 forgets, token 2 asks. Binding has no mark: a key without a
mark before it is bound to the next token. Keys are tokens of the first half of the vocabulary, values of the second;
filler is never a key of the sequence. Source: ours, after the MQAR of zoology.
"""

from __future__ import annotations

import numpy as np
import torch

from cramlab.batch import Batch, Predictions
from cramlab.config import ConfigError, Count, CountOrZero, Size, checked
from cramlab.tasks.recall import Drawn, RecallTask, filler, spread

NOTHING, FORGET, ASK = range(3)


@checked("task")
class RebindingConfig(RecallTask):
    """Associative recall with rebinding and forgetting.

    Attributes:
        seq_len: tokens per sequence.
        n_keys: keys per sequence, each bound before anything else happens.
        n_rebound: later events that give a key another value.
        n_forgotten: later events that forget a key.
        n_queries: later events that ask for a key.
        vocab_size: number of tokens.
    """

    stream = 207
    seq_len: Size = 64
    n_keys: Count = 4
    n_rebound: CountOrZero = 2
    n_forgotten: CountOrZero = 1
    n_queries: Count = 4
    vocab_size: Size = 8192

    def __post_init__(self) -> None:
        """Raises ConfigError when the events fit neither the sequence nor the vocabulary."""
        events = 2 * (self.n_keys + self.n_rebound + self.n_forgotten + self.n_queries)
        if events > self.seq_len:
            raise ConfigError(f"task.seq_len = {self.seq_len} does not hold the {events} tokens of all events")
        if self.n_keys >= self.vocab_size // 2 - 3:
            raise ConfigError(f"task.n_keys = {self.n_keys} needs a vocab_size above {2 * self.n_keys + 7}")

    @property
    def asked_per_sequence(self) -> int:
        """Every query is answered, those for forgotten keys by token 0."""
        return self.n_queries

    def sequence(self, rng: np.random.Generator) -> Drawn:
        """Implements `RecallTask.sequence`."""
        half = self.vocab_size // 2
        keys = 3 + rng.choice(half - 3, size=self.n_keys, replace=False)
        later = rng.permutation(["="] * self.n_rebound + ["!"] * self.n_forgotten + ["?"] * self.n_queries)
        marks = ["="] * self.n_keys + later.tolist()
        about = np.concatenate([keys, rng.choice(keys, size=len(later))])
        starts = spread(rng, np.full(len(marks), 2), self.seq_len)
        tokens, answers = filler(rng, self.seq_len, 3, self.vocab_size, keys), np.full(self.seq_len, -1)
        slices = {name: np.zeros(self.seq_len, bool) for name in ("unchanged", "rebound", "forgotten")}
        held: dict[int, int] = {}
        state: dict[int, str] = {}
        for mark, key, at in zip(marks, about.tolist(), starts.tolist(), strict=True):
            if mark == "=":
                state[key] = "rebound" if key in held else "unchanged"
                held[key] = int(half + rng.integers(self.vocab_size - half))
                tokens[at : at + 2] = key, held[key]
            elif mark == "!":
                held[key], state[key] = NOTHING, "forgotten"
                tokens[at : at + 2] = FORGET, key
            else:
                tokens[at : at + 2] = ASK, key
                answers[at + 1] = held[key]
                slices[state[key]][at + 1] = True
        return Drawn(tokens, answers, slices)

    def oracle(self, batch: Batch) -> Predictions:
        """Replays the events: a value after an unmarked token binds that token, whether it is a key or filler."""
        found = torch.zeros_like(batch.retrieval_target)
        for row, tokens in enumerate(batch.discrete[..., 0].tolist()):
            held: dict[int, int] = {}
            for at, token in enumerate(tokens):
                mark = tokens[at - 1] if at else NOTHING
                if mark == ASK:
                    found[row, at] = held.get(token, NOTHING)
                elif mark == FORGET:
                    held[token] = NOTHING
                elif at + 1 < len(tokens):
                    held[token] = tokens[at + 1]
        return self.answering(found)

    def floor(self, batch: Batch) -> Predictions:
        """Answers with the first value of the sequence."""
        return self.answering(batch.discrete[:, 1, :].expand(-1, self.seq_len))
