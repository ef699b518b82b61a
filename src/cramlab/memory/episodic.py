"""Episodic memory: attention over a bounded buffer of past tokens (Eq. 3), scored only for the tokens that read.

Keys and values exist for the tokens that are written, queries for those that read, and a reader is scored against the
part of the buffer that it can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.memory.salience import SalienceGate
from cramlab.memory.window_attention import window_attention

WriteRule = Literal["all", "salience"]


class Buffer(NamedTuple):
    """What has been written and not yet evicted, oldest first.

    Attributes:
        keys: (B, S, D).
        values: (B, S, D).
        times: time since the entry was written, (B, S).
        filled: false on empty places, bool (B, S).
    """

    keys: Tensor
    values: Tensor
    times: Tensor
    filled: Tensor

    @property
    def n_places(self) -> int:
        """S: entries that it holds at most in any of its sequences."""
        return self.keys.shape[1]

    @property
    def n_bytes(self) -> int:
        """Held between calls, all sequences and all parts together."""
        return sum(part.numel() * part.element_size() for part in self)


class Written(NamedTuple):
    """What the tokens of a call can read: the buffer after their writes, before any eviction.

    Attributes:
        buffer: entries from before the call and of the call.
        last: the newest place that each token of the call may see, int64 (B, T); -1: none.
    """

    buffer: Buffer
    last: Tensor


@dataclass(frozen=True, kw_only=True)
class EpisodicMemoryConfig:
    """Sizes of the episodic memory, and what is written.

    Attributes:
        n_heads: attention heads.
        capacity: M, entries kept; None keeps all. When full, the oldest entry goes (ours: the paper says "novel
            events" without a rule). 4,096: twice the paper's sequence, so that nothing that a query asks for has been
            evicted.
        write: "all": every valid token; "salience": those that a learned gate expects to be asked for.
        write_price: use (see `SalienceGate`) that an entry must be expected to find to be worth its place.
        write_audit_frac: share of the tokens refused by the gate that is written anyway in training, 0 to 1.
    """

    n_heads: int = 4
    capacity: int | None = 4096
    write: WriteRule = "all"
    write_price: float = 0.02
    write_audit_frac: float = 0.1

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.n_heads < 1:
            raise ValueError(f"episodic.n_heads = {self.n_heads} must be at least 1")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"episodic.capacity = {self.capacity} must be at least 1, or None to keep everything")
        if self.write not in WriteRule.__args__:  # type: ignore[attr-defined]
            raise ValueError(f'episodic.write = "{self.write}" is unknown; give "all" or "salience"')
        if not self.write_price > 0:
            raise ValueError(f"episodic.write_price = {self.write_price} must be positive")
        if not 0 <= self.write_audit_frac <= 1:
            raise ValueError(f"episodic.write_audit_frac = {self.write_audit_frac} is not a share; give 0 to 1")


class EpisodicMemory(nn.Module):
    """Writes tokens into a buffer; reads for those tokens only that ask.

    A token sees the entries written up to and including itself, as long as fewer than `capacity` have been written
    since. With `write="salience"` a token that was not written does not see itself.

    Source: paper sec. 4, Eq. 3. Differs: several heads; entries carry no read count, since eviction by age needs none.
    """

    def __init__(self, config: EpisodicMemoryConfig, d_model: int) -> None:
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(
                f"episodic.n_heads = {config.n_heads} does not divide d_model = {d_model}; change one of them"
            )
        self.config = config
        self.w_query = nn.Linear(d_model, d_model, bias=False)
        self.w_key = nn.Linear(d_model, d_model, bias=False)
        self.w_value = nn.Linear(d_model, d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)
        self.salience = SalienceGate(d_model) if config.write == "salience" else None

    def initial_buffer(self, n_batch: int) -> Buffer:
        """A buffer without entries."""
        empty = self.w_key.weight.new_zeros(n_batch, 0, self.w_key.out_features)
        return Buffer(
            keys=empty, values=empty, times=empty[..., 0], filled=torch.zeros_like(empty[..., 0], dtype=torch.bool)
        )

    def write(self, h: Tensor, gaps: Tensor, buffer: Buffer, writes: Tensor | None) -> Written:
        """Adds tokens of this call to the buffer; keys and values are computed for these alone.

        Args:
            h: (B, T, D).
            gaps: (B, T); zero on padding.
            buffer: from `initial_buffer` or `evict`.
            writes: the tokens to write, never padding, bool (B, T); None: all.
        """
        n_before, n_tokens = buffer.n_places, h.shape[1]
        now = gaps.cumsum(dim=-1)
        total = now[:, -1:]
        if self.salience is None:  # every token has a place, also the padding, so that no gather is needed
            filled = torch.ones_like(gaps, dtype=torch.bool) if writes is None else writes
            keys, values, ages = self.w_key(h), self.w_value(h), total - now
            last = torch.arange(n_before, n_before + n_tokens, device=h.device).expand(h.shape[:2])
        else:
            writes = torch.ones_like(gaps, dtype=torch.bool) if writes is None else writes
            rank = writes.cumsum(dim=1)
            last = n_before + rank - 1
            n_most = int(rank[:, -1:].amax()) if writes.numel() else 0
            token = writes.flatten().nonzero().squeeze(-1)
            place = (rank - 1 + n_most * torch.arange(len(h), device=h.device)[:, None]).flatten()[token]
            chosen = h.flatten(0, 1).index_select(0, token)

            def packed(entries: Tensor) -> Tensor:
                if len(h) == 1:  # nothing to fill up
                    return entries[None]
                empty = entries.new_zeros(len(h) * n_most, *entries.shape[1:])
                return empty.index_copy(0, place, entries).unflatten(0, (len(h), n_most))

            keys, values = packed(self.w_key(chosen)), packed(self.w_value(chosen))
            ages, filled = packed((total - now).flatten()[token]), packed(torch.ones_like(token, dtype=torch.bool))
        grown = Buffer(
            keys=_joined(buffer.keys, keys),
            values=_joined(buffer.values, values),
            times=torch.cat([buffer.times + total, ages], dim=1) if n_tokens else buffer.times,
            filled=_joined(buffer.filled, filled),
        )
        return Written(buffer=grown, last=last)

    def evict(self, buffer: Buffer) -> Buffer:
        """The newest `capacity` entries of each sequence, without the empty places that all sequences share."""
        n_filled = int(buffer.filled.sum(dim=1).max()) if buffer.n_places else 0
        keep = n_filled if self.config.capacity is None else min(n_filled, self.config.capacity)
        ordered = bool((buffer.filled[:, 1:] >= buffer.filled[:, :-1]).all())  # empty places are in front already
        if keep == buffer.n_places and ordered:
            return buffer
        # A stable sort by "filled" moves empty places to the front and keeps the order of the others.
        order = buffer.filled.to(torch.int8).argsort(dim=1, stable=True)[:, buffer.n_places - keep :]
        wide = order[..., None].expand(-1, -1, buffer.keys.shape[-1])
        return Buffer(
            keys=buffer.keys.gather(1, wide),
            values=buffer.values.gather(1, wide),
            times=buffer.times.gather(1, order),
            filled=buffer.filled.gather(1, order),
        )

    def can_read(self, written: Written) -> Tensor:
        """The tokens that see at least one entry, bool (B, T). With `write="all"` each sees itself."""
        if self.salience is None:
            return torch.ones_like(written.last, dtype=torch.bool)
        n_seen = F.pad(written.buffer.filled.long().cumsum(dim=1), (1, 0))
        return n_seen.gather(1, written.last + 1) > 0

    def read(self, h: Tensor, reads: Tensor | None, written: Written) -> Tensor:
        """Attention over the buffer for the tokens that read (Eq. 3).

        Args:
            h: tokens of the call that made `written`, (B, T, D).
            reads: which tokens read, bool (B, T), among those that can; None: all, and all can.
            written: from `write`.

        Returns:
            (B, T, D); zero where a token did not read. Only reading tokens are projected and scored, each against the
            entries that it sees, rounded up to the last one seen by its block of readers.
        """
        buffer = written.buffer
        if reads is None:
            sees_all = self.config.capacity is None or self.config.capacity >= buffer.n_places
            equal = self.salience is None and buffer.n_places == h.shape[1]
            if equal and sees_all and bool(buffer.filled.all()):
                return self.w_out(self._attend(self.w_query(h), buffer, None))
            visible = visible_places(buffer.filled, written.last, self.config.capacity)
            return self.w_out(self._attend(self.w_query(h), buffer, visible))
        found, token = self.read_some(h, reads, written)
        return found.new_zeros(reads.numel(), found.shape[-1]).index_copy(0, token, found).view_as(h)

    def read_some(self, h: Tensor, reads: Tensor, written: Written) -> tuple[Tensor, Tensor]:
        """As `read`, for those alone that read.

        Returns:
            Their answers, (R, D), and which tokens of all sequences together they are, (R,).
        """
        buffer = written.buffer
        token = reads.flatten().nonzero().squeeze(-1)
        q, last = self.w_query(h.flatten(0, 1).index_select(0, token)), written.last.flatten().index_select(0, token)
        if not len(token):  # the parameters take part all the same: data parallel waits for every gradient
            return self.w_out(q) + buffer.keys[:, :0].sum() + buffer.values[:, :0].sum(), token
        return self.w_out(self._attend_some(q, last, reads, buffer)), token

    def _attend_some(self, q: Tensor, last: Tensor, reads: Tensor, buffer: Buffer) -> Tensor:
        """Attention of the readers of all sequences together, (R, D) for q (R, D) and last (R,)."""
        if q.device.type != "cpu" or torch.compiler.is_compiling():  # few launches are worth some filling up
            return self._attend_padded(q, last, reads, buffer)
        # Sequence by sequence, so that rows with few reads are not filled up to the row with most.
        answers, counts = [], reads.sum(dim=1).tolist()
        for b, (some, newest) in enumerate(zip(q.split(counts), last.split(counts), strict=True)):
            if len(some):
                keys, values, filled = buffer.keys[b], buffer.values[b], buffer.filled[b]
                if not bool(filled.all()):  # close the gaps, then what a reader sees is a window
                    newest = filled.cumsum(dim=0)[newest] - 1
                    keys, values = (t.index_select(0, filled.nonzero().squeeze(-1)) for t in (keys, values))
                newest = newest.tolist()
                capacity = self.config.capacity or len(keys)
                oldest = [max(0, place - capacity + 1) for place in newest]
                answers.append(window_attention(some, keys, values, oldest, newest, self.config.n_heads))
        return torch.cat(answers) if len(answers) > 1 else answers[0]

    def _attend_padded(self, q: Tensor, last: Tensor, reads: Tensor, buffer: Buffer) -> Tensor:
        """All sequences at once, each filled up to the one with most reads. (R, D) for q (R, D) and last (R,)."""
        row, token = reads.nonzero(as_tuple=True)
        rank = reads.cumsum(dim=1)[row, token] - 1
        shape = (len(reads), int(rank.max()) + 1)
        # Filled-up places ask what the last reader of their sequence asks for, or place 0; nobody looks at the answer.
        padded_last = last.new_zeros(shape).index_put((row, rank), last).cummax(dim=1).values
        padded_q = q.new_zeros(*shape, q.shape[-1]).index_put((row, rank), q)
        return self._attend_in_blocks(padded_q, padded_last, buffer)[row, rank]

    def _attend_in_blocks(self, q: Tensor, last: Tensor, buffer: Buffer) -> Tensor:
        """Attention of readers in order, block by block, each against the places that its readers see.

        Args:
            q: (B, R, D).
            last: newest place seen, never falling along a row, (B, R).
            buffer: of the same sequences.
        """
        capacity, size = self.config.capacity, block_size(q.shape[1])
        if capacity is not None and capacity >= buffer.n_places:
            capacity = None
        full = bool(buffer.filled.all())
        oldest, newest = last.amin(dim=0).tolist(), last.amax(dim=0).tolist()
        answers = []
        for start in range(0, q.shape[1], size):
            block = slice(start, start + size)
            end = newest[block][-1] + 1
            begin = max(0, oldest[start] - capacity + 1) if full and capacity is not None else 0
            part = Buffer(*(tensor[:, begin:end] for tensor in buffer))
            place = last[:, block] - begin
            if full and capacity is None:
                alike = oldest[start] == end - 1  # all of them see all of it
                places = torch.arange(part.n_places, device=q.device)
                visible = None if alike else places <= place[..., None]
            else:
                alike, visible = False, visible_places(part.filled, place, capacity)
            answers.append(self._attend(q[:, block], part, visible, causal=False))
        return torch.cat(answers, dim=1)

    def _attend(self, q: Tensor, buffer: Buffer, visible: Tensor | None, *, causal: bool = True) -> Tensor:
        """Multi-head attention of q (B, R, D); `visible` None: causal over equal lengths, or everything is seen."""
        heads = (self.config.n_heads, -1)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, buffer.keys, buffer.values))  # (B, H, R, Dh)
        mask = None if visible is None else visible[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None and causal)
        return y.transpose(1, 2).flatten(2)

    def salience_loss(self, logit: Tensor, h: Tensor, asks: Tensor, writes: Tensor, written: Written) -> Tensor:
        """Teaches the write gate from how much the entries of this call were used in it. Scalar.

        Args:
            logit: of the gate, (B, T).
            h: as for `write`.
            asks: the tokens whose reads count: those that would also read when decoding, bool (B, T).
            writes: as for `write`.
            written: from `write`.
        """
        assert self.salience is not None
        with torch.no_grad():
            use = self._use(h, asks, writes, written)
        row, token = writes.nonzero(as_tuple=True)
        return self.salience.loss(logit[row, token], use[row, written.last[row, token]], self.config.write_price)

    def _use(self, h: Tensor, asks: Tensor, writes: Tensor, written: Written) -> Tensor:
        """Squared attention weight that each place of the buffer got, summed over readers, mean over heads; (B, S)."""
        buffer, heads = written.buffer, (self.config.n_heads, -1)
        use = buffer.times.new_zeros(buffer.filled.shape)
        k = buffer.keys.unflatten(-1, heads)
        places = torch.arange(buffer.n_places, device=h.device)
        for b, row in enumerate(asks & self.can_read(written)):
            for some in row.nonzero().squeeze(-1).split(128):  # so that memory stays bounded
                last = written.last[b, some]
                q = self.w_query(h[b, some]).unflatten(-1, heads)
                visible = visible_places(buffer.filled[b : b + 1], last[None], self.config.capacity)[0]
                scores = torch.einsum("rhd,shd->hrs", q, k[b]) / q.shape[-1] ** 0.5
                weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
                own = writes[b, some, None] & (places == last[:, None])  # what a token is to itself needs no buffer
                use[b] += weights.square().mean(dim=0).masked_fill(own, 0.0).sum(dim=0)
        return use


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Both along the places, without a copy where nothing is new, unless a gradient has to pass, or nothing old."""
    if not new.shape[1] and not new.requires_grad:
        return old
    return torch.cat([old, new], dim=1) if old.shape[1] else new


def block_size(n_readers: int) -> int:
    """Readers scored together: small blocks see little beyond their prefix, large ones make better products."""
    return min(256, max(32, n_readers // 8))


def visible_places(filled: Tensor, place: Tensor, capacity: int | None) -> Tensor:
    """Which places of a buffer each token may see.

    Args:
        filled: bool (B, S).
        place: the newest place that each token may see: with `write="all"` its own, (B, R).
        capacity: entries still held at any time; None: all.

    Returns:
        bool (B, R, S): filled, not later than the token, and among the newest `capacity` at its time. A token's own
        place is always included, so that no row is empty; on padding the caller drops the answer.
    """
    places = torch.arange(filled.shape[1], device=filled.device)
    visible = filled[:, None] & (places <= place[..., None])
    if capacity is not None and capacity < filled.shape[1]:
        n_written = filled.cumsum(dim=1)
        newer = n_written.gather(1, place)[..., None] - n_written[:, None]
        visible = visible & (newer < capacity)
    return visible | (places == place[..., None])
