"""Layouts for the tokens that read: all tokens, none, the readers alone (ragged), or padded to equal length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from cramlab.memory.buffer import Written
from cramlab.ops import dispatch
from cramlab.ops.read import attention
from cramlab.ops.read.visibility import visible_places
from cramlab.ops.read.windows import window_attention
from cramlab.ops.select.tokens import Chosen, first_tokens, put_onto, take


class Readers(ABC):
    """The tokens of a call that read.

    Each class has one layout for the rows of readers, "rows" below: (B, T, ...), (R, ...) or (B, R, ...).

    Attributes:
        mask: true for the tokens that read, bool (B, T).
        present: true for rows that belong to a reader, bool, in the layout of rows; None: all rows do.
    """

    mask: Tensor
    present: Tensor | None = None

    @abstractmethod
    def take(self, entries: Tensor, absent: int = 0) -> Tensor:
        """Rows of the readers, from entries (B, T, ...); `absent` in rows without a reader."""

    @abstractmethod
    def put_onto(self, rows: Tensor, onto: Tensor) -> Tensor:
        """A copy of `onto` (B, T, ...) in which the rows of the readers replace theirs."""

    @final
    def attend(self, q: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        """Attention of the readers to the entries that they see; rows of width D, before any output projection.

        Args:
            q: queries, rows of width D.
            written: entries, and which of them each token sees.
            n_heads: number of heads that share D.
            capacity: a reader sees the newest `capacity` entries up to its `last`; None: all of them.
        """
        if not q.numel():  # keys and values still get a gradient, of zero: data parallelism waits for every gradient
            return q + written.buffer.keys[:, :0].sum() + written.buffer.values[:, :0].sum()
        return self._attend(q, written, n_heads, capacity)

    @abstractmethod
    def _attend(self, q: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        """`attend` for at least one row."""

    @abstractmethod
    def use(self, q: Tensor, own: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        """Squared attention weight of each slot, summed over the readers, mean over heads, (B, S).

        Args:
            q: queries, rows of width D.
            own: slot of each token's own entry, whose weight does not count, int64 (B, T); -1: it has none.
            written: as in `attend`.
            n_heads: as in `attend`.
            capacity: as in `attend`.
        """


@final
class All(Readers):
    """Every token reads. Rows are (B, T, ...)."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def take(self, entries: Tensor, absent: int = 0) -> Tensor:  # noqa: ARG002
        """Implements `Readers.take`."""
        return entries

    def put_onto(self, rows: Tensor, onto: Tensor) -> Tensor:  # noqa: ARG002
        """Implements `Readers.put_onto`."""
        return rows

    def _attend(self, q: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        buffer = written.buffer
        if written.is_causal(capacity):
            return attention.dense(q, buffer.keys, buffer.values, n_heads, causal=True)
        visible = visible_places(written.last.clamp(min=0), buffer.n_places, buffer.filled, capacity)
        return attention.dense(q, buffer.keys, buffer.values, n_heads, visible)

    def use(self, q: Tensor, own: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        """Implements `Readers.use`."""
        return attention.use(q, written.last, own, written.buffer.keys, written.filled, n_heads, capacity)


@final
class Nobody(Readers):
    """No token reads. Rows are (B, 0, ...)."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def take(self, entries: Tensor, absent: int = 0) -> Tensor:  # noqa: ARG002
        """Implements `Readers.take`."""
        return entries[:, :0]

    def put_onto(self, rows: Tensor, onto: Tensor) -> Tensor:
        """Implements `Readers.put_onto`. What would have made the rows gets a gradient of zero."""
        return torch.cat([onto, rows.to(onto.dtype)], dim=1)

    def _attend(self, q: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:  # noqa: ARG002
        return q

    def use(self, q: Tensor, own: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:  # noqa: ARG002
        """Implements `Readers.use`."""
        return torch.zeros_like(written.buffer.keys[..., 0])


@final
class Gathered(Readers):
    """The readers of all sequences, concatenated without padding. Rows are (R, ...)."""

    def __init__(self, mask: Tensor, token: Tensor, counts: list[int]) -> None:
        """Takes the indices of the readers among all B T tokens, (R,), and the number of readers of each sequence."""
        self.mask, self.token, self.counts = mask, token, counts

    def take(self, entries: Tensor, absent: int = 0) -> Tensor:  # noqa: ARG002
        """Implements `Readers.take`."""
        return entries.flatten(0, 1).index_select(0, self.token)

    def put_onto(self, rows: Tensor, onto: Tensor) -> Tensor:
        """Implements `Readers.put_onto`."""
        return onto.flatten(0, 1).index_copy(0, self.token, rows.to(onto.dtype)).view_as(onto)

    def _attend(self, q: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        buffer, answers = written.buffer, []
        by_sequence = zip(q.split(self.counts), self.take(written.last).split(self.counts), strict=True)
        for b, (some, last) in enumerate(by_sequence):
            if len(some):
                keys, values, filled = buffer.keys[b], buffer.values[b], buffer.filled[b]
                if not bool(filled.all()):  # without the empty slots, a reader sees a window
                    last = filled.cumsum(dim=0)[last] - 1
                    keys, values = (t.index_select(0, filled.nonzero().squeeze(-1)) for t in (keys, values))
                newest = last.tolist()
                oldest = [max(0, place - (capacity or len(keys)) + 1) for place in newest]
                answers.append(window_attention(some, keys, values, oldest, newest, n_heads))
        return torch.cat(answers) if len(answers) > 1 else answers[0]

    def use(self, q: Tensor, own: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        """Implements `Readers.use`."""
        rows = (t.split(self.counts) for t in (q, self.take(written.last), self.take(own)))
        found = []
        for b, (some, last, places) in enumerate(zip(*rows, strict=True)):
            keys = written.buffer.keys[b : b + 1]
            filled = None if written.filled is None else written.filled[b : b + 1]
            found.append(attention.use(some[None], last[None], places[None], keys, filled, n_heads, capacity))
        return torch.cat(found)


@final
class Packed(Readers):
    """The readers of each sequence, padded to equal length. Rows are (B, R, ...).

    Few kernels are launched, and with a fixed R no size depends on which tokens read.
    """

    def __init__(self, mask: Tensor, chosen: Chosen, *, waits: bool = False) -> None:
        """Takes the tokens of `mask` as `first_tokens` found them. `waits`: see `attention.attend`."""
        self.mask, self.chosen, self.present, self.waits = mask, chosen, chosen.there, waits

    def take(self, entries: Tensor, absent: int = 0) -> Tensor:
        """Implements `Readers.take`."""
        return take(entries, self.chosen, absent)

    def put_onto(self, rows: Tensor, onto: Tensor) -> Tensor:
        """Implements `Readers.put_onto`."""
        return put_onto(rows, self.chosen, onto)

    def _attend(self, q: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        last, (keys, values, *_) = self.take(written.last, -1), written.buffer
        return attention.attend(q, last, keys, values, written.filled, n_heads, capacity, waits=self.waits)

    def use(self, q: Tensor, own: Tensor, written: Written, n_heads: int, capacity: int | None) -> Tensor:
        """Implements `Readers.use`."""
        last, own = self.take(written.last, -1), self.take(own, -1)
        return attention.use(q, last, own, written.buffer.keys, written.filled, n_heads, capacity)


def select_readers(reads: Tensor, most: int | None = None) -> Readers:
    """The tokens that read, in the layout that their device executes fastest.

    Args:
        reads: bool (B, T).
        most: only the first `most` of these tokens of each sequence read, and no size depends on `reads`; None: all
            of them read, for whose number this waits for the device.
    """
    if most is not None:
        chosen = first_tokens(reads, most)
        return Packed(reads & (chosen.rank <= most), chosen)
    counts = reads.sum(dim=1).tolist()
    if sum(counts) == reads.numel():
        return All(reads)
    if dispatch.few_launches(reads.device) or torch.compiler.is_compiling():
        return Packed(reads, first_tokens(reads, max(counts)), waits=True)
    return Gathered(reads, reads.flatten().nonzero().squeeze(-1), counts)


def select_everyone(tokens: Tensor, *, fixed: bool) -> Readers:
    """The layout for nearly all tokens of a call, each of which sees few places.

    Args:
        tokens: bool (B, T).
        fixed: no size may depend on `tokens`.
    """
    if fixed or dispatch.few_launches(tokens.device) or torch.compiler.is_compiling():
        return select_readers(tokens, tokens.shape[1])
    return Gathered(tokens, tokens.flatten().nonzero().squeeze(-1), tokens.sum(dim=1).tolist())
