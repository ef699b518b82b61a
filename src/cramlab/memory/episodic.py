"""Episodic memory: attention over a bounded buffer of past tokens (Eq. 3), scored only for the tokens that read.

Keys and values exist for the tokens that are written, queries for those that read, and a reader is scored against the
part of the buffer that it can see.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Count, Positive, Share, Size, checked
from cramlab.memory.write_gate import SalienceGate
from cramlab.ops import launches
from cramlab.ops.read import fused as fused_read
from cramlab.ops.read.windows import window_attention
from cramlab.ops.select.tokens import Chosen, first_tokens, put, running_sum, take

WriteRule = Literal["all", "salience"]
_MOST_WEIGHTS = 1 << 26  # attention weights held at once where the use of entries is counted


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
        gapless: all places up to any `last` are filled; known without looking, which would wait for the device.
        full: all places are filled; likewise.
    """

    buffer: Buffer
    last: Tensor
    gapless: bool = False
    full: bool = False


@checked("model.mixer.episodic")
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

    n_heads: Size = 4
    capacity: Count | None = 4096
    write: WriteRule = "all"
    write_price: Positive = 0.02
    write_audit_frac: Share = 0.1


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

    def initial_buffer(self, n_batch: int, like: Tensor | None = None) -> Buffer:
        """A buffer without entries, of the type and place of `like`, (..., D); None: of the parameters."""
        like = self.w_key.weight if like is None else like
        empty = like.new_zeros(n_batch, 0, like.shape[-1])
        return Buffer(
            keys=empty, values=empty, times=empty[..., 0], filled=torch.zeros_like(empty[..., 0], dtype=torch.bool)
        )

    def write(
        self, h: Tensor, gaps: Tensor, buffer: Buffer, writes: Tensor | None, *, most: int | None = None
    ) -> Written:
        """Adds tokens of this call to the buffer; keys and values are computed for these alone.

        Args:
            h: (B, T, D).
            gaps: (B, T); zero on padding.
            buffer: from `initial_buffer` or `evict`.
            writes: the tokens to write, never padding, bool (B, T); None: all.
            most: of each sequence at most the first so many of these are written, and the buffer grows by as many
                places: a caller that knows a bound keeps a gate's decision from having to leave the device. None: all.
        """
        n_before, n_tokens = buffer.n_places, h.shape[1]
        now = running_sum(gaps)
        total = now[:, -1:]
        if self.salience is None:  # every token has a place, also the padding, so that no gather is needed
            filled = torch.ones_like(gaps, dtype=torch.bool) if writes is None else writes
            keys, values, ages = self.w_key(h), self.w_value(h), total - now
            last = torch.arange(n_before, n_before + n_tokens, device=h.device).expand(h.shape[:2])
            gapless = full = not n_before and writes is None
        else:
            writes = torch.ones_like(gaps, dtype=torch.bool) if writes is None else writes
            gapless, full = not n_before, not n_before and len(h) == 1 and most is None
            if most is None and len(h) > 1 and not launches.bind(h.device):
                rank = running_sum(writes)
                keys, values, ages, filled = self._packed(h, total - now, writes, rank)
            else:
                chosen = first_tokens(writes, most)
                rank = running_sum(writes) if chosen.rank is None else chosen.rank
                keys, values, ages, filled = self._packed_together(h, total - now, chosen)
            last = (rank if most is None else rank.clamp(max=most)) + (n_before - 1)
        grown = Buffer(
            keys=_joined(buffer.keys, keys),
            values=_joined(buffer.values, values),
            times=_joined(buffer.times + total, ages) if n_tokens else buffer.times,
            filled=_joined(buffer.filled, filled),
        )
        return Written(buffer=grown, last=last, gapless=gapless, full=full)

    def _packed(self, h: Tensor, ages: Tensor, writes: Tensor, rank: Tensor) -> Buffer:
        """Entries of the tokens of `writes` (B, T) in order, from h (B, T, D) and ages (B, T), and none but these."""
        n_most = int(rank[:, -1:].amax()) if writes.numel() else 0
        token = writes.flatten().nonzero().squeeze(-1)
        place = (rank - 1 + n_most * torch.arange(len(h), device=h.device)[:, None]).flatten()[token]
        chosen = h.flatten(0, 1).index_select(0, token)

        def packed(entries: Tensor) -> Tensor:
            empty = entries.new_zeros(len(h) * n_most, *entries.shape[1:])
            return empty.index_copy(0, place, entries).unflatten(0, (len(h), n_most))

        return Buffer(
            keys=packed(self.w_key(chosen)),
            values=packed(self.w_value(chosen)),
            times=packed(ages.flatten()[token]),
            filled=packed(torch.ones_like(token, dtype=torch.bool)),
        )

    def _packed_together(self, h: Tensor, ages: Tensor, chosen: Chosen) -> Buffer:
        """`_packed` with some entry on the empty places too, in few launches."""
        some, there = take(h, chosen), chosen.there
        filled = torch.ones_like(chosen.token, dtype=torch.bool) if there is None else there
        return Buffer(self.w_key(some), self.w_value(some), take(ages, chosen), filled)

    def evict(self, buffer: Buffer, *, full: bool = False, waits: bool = True) -> Buffer:
        """The newest `capacity` entries of each sequence, without the empty places that all sequences share.

        Args:
            buffer: of `Written`.
            full: it is known to have no empty places.
            waits: for the device, to know how many places all sequences have empty; else these stay, in front.
        """
        if full:
            excess = 0 if self.config.capacity is None else buffer.n_places - self.config.capacity
            return buffer if excess <= 0 else Buffer(*(part[:, excess:].clone() for part in buffer))
        n_filled = int(buffer.filled.sum(dim=1).max()) if buffer.n_places and waits else buffer.n_places
        keep = n_filled if self.config.capacity is None else min(n_filled, self.config.capacity)
        if waits and keep == buffer.n_places and bool((buffer.filled[:, 1:] >= buffer.filled[:, :-1]).all()):
            return buffer  # empty places are in front already
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
        if written.gapless:
            return written.last >= 0
        n_seen = F.pad(written.buffer.filled.long().cumsum(dim=1), (1, 0))
        return n_seen.gather(1, written.last + 1) > 0

    def read(self, h: Tensor, reads: Tensor | None, written: Written, *, most: int | None = None) -> Tensor:
        """Attention over the buffer for the tokens that read (Eq. 3).

        Args:
            h: tokens of the call that made `written`, (B, T, D).
            reads: which tokens read, bool (B, T), among those that can; None: all, and all can.
            written: from `write`.
            most: of each sequence at most the first so many of these read; see `write`. None: all.

        Returns:
            (B, T, D); zero where a token did not read. Only reading tokens are projected and scored, each against the
            entries that it sees, rounded up to the last one seen by its block of readers.
        """
        buffer = written.buffer
        if reads is None:
            sees_all = self.config.capacity is None or self.config.capacity >= buffer.n_places
            equal = self.salience is None and buffer.n_places == h.shape[1]
            if equal and sees_all and (written.full or bool(buffer.filled.all())):
                return self.w_out(self._attend(self.w_query(h), buffer, None))
            visible = visible_places(buffer.filled, written.last, self.config.capacity)
            return self.w_out(self._attend(self.w_query(h), buffer, visible))
        if most is not None or _few_calls(h):
            return self._read_together(h, reads, written, most, waits=most is None)
        token = reads.flatten().nonzero().squeeze(-1)
        found = self.read_some(h, reads, token, written)
        return found.new_zeros(reads.numel(), found.shape[-1]).index_copy_(0, token, found).view_as(h)

    def read_some(self, h: Tensor, reads: Tensor, token: Tensor, written: Written) -> Tensor:
        """As `read`, for those alone that read, (R, D).

        Args:
            h: as for `read`.
            reads: as for `read`.
            token: which tokens these are, counted over all sequences, int64 (R,).
            written: as for `read`.
        """
        if _few_calls(h):
            most = len(token) if len(h) == 1 else None  # known, so that the device is not waited for again
            return self._read_together(h, reads, written, most).flatten(0, 1).index_select(0, token)
        q, last = self.w_query(h.flatten(0, 1).index_select(0, token)), written.last.flatten().index_select(0, token)
        if not len(token):
            return q + self._no_answer(q, written.buffer)
        return self.w_out(self._attend_by_sequence(q, last, reads, written.buffer))

    def _attend_by_sequence(self, q: Tensor, last: Tensor, reads: Tensor, buffer: Buffer) -> Tensor:
        """Attention of the readers of all sequences, (R, D) for q (R, D) and last (R,), one sequence after another.

        So that rows with few reads are not filled up to the row with most.
        """
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

    def _read_together(
        self, h: Tensor, reads: Tensor, written: Written, most: int | None, *, waits: bool = True
    ) -> Tensor:
        """`read` of all sequences at once, each filled up to the one with most reads, in few launches."""
        chosen = first_tokens(reads, most)
        if not chosen.token.shape[1]:
            return torch.zeros_like(h) + self._no_answer(self.w_query(take(h, chosen)), written.buffer)
        return put(self.read_first(h, chosen, written, waits=waits), chosen, h.shape[1])

    def read_first(self, h: Tensor, chosen: Chosen, written: Written, *, waits: bool = False) -> Tensor:
        """As `read`, for the tokens of `first_tokens` alone, (B, R, D); some answer where one is filled up.

        The fused kernel leaves these alone. Its twin may wait for the device, to score no more than is seen.
        """
        q, last = self.w_query(take(h, chosen)), take(written.last, chosen, -1)
        return self.w_out(self._attend_chosen(q, last, written, waits=waits))

    def _attend_chosen(self, q: Tensor, last: Tensor, written: Written, *, waits: bool = True) -> Tensor:
        """Attention of readers (B, R, D) up to `last` (B, R), -1 where a reader is filled up."""
        buffer, n_heads = written.buffer, self.config.n_heads
        if fused_read.usable(q, n_heads):
            filled = None if written.gapless else buffer.filled
            return fused_read.attend(q, last, buffer.keys, buffer.values, filled, n_heads, self.config.capacity)
        if not waits:
            return self._attend(q, buffer, visible_places(buffer.filled, last.clamp(min=0), self.config.capacity))
        return self._attend_in_blocks(q, last.clamp(min=0).cummax(dim=1).values, buffer, full=written.full)

    def _no_answer(self, q: Tensor, buffer: Buffer) -> Tensor:
        """Zero, of no readers; the parameters take part all the same, as data parallel waits for every gradient."""
        return self.w_out(q).sum() + buffer.keys[:, :0].sum() + buffer.values[:, :0].sum()

    def _attend_in_blocks(self, q: Tensor, last: Tensor, buffer: Buffer, *, full: bool = False) -> Tensor:
        """Attention of readers in order, block by block, each against the places that its readers see.

        Args:
            q: (B, R, D).
            last: newest place seen, never falling along a row, (B, R).
            buffer: of the same sequences.
            full: it is known to have no empty places.
        """
        capacity, size = self.config.capacity, block_size(q.shape[1])
        if capacity is not None and capacity >= buffer.n_places:
            capacity = None
        full = full or bool(buffer.filled.all())
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

    def salience_loss(
        self,
        logit: Tensor,
        h: Tensor,
        asks: Tensor,
        writes: Tensor,
        written: Written,
        *,
        most: int | None = None,
        by_sequence: bool = False,
    ) -> Tensor:
        """Teaches the write gate from how much the entries of this call were used in it. Scalar.

        Args:
            logit: of the gate, (B, T).
            h: as for `write`.
            asks: the tokens whose reads count: those that would also read when decoding, bool (B, T).
            writes: as for `write`.
            written: from `write`.
            most: tokens of a sequence that ask, at most; None: not known.
            by_sequence: the sum over the tokens of each sequence, (B,), instead of the mean.
        """
        assert self.salience is not None
        with torch.no_grad():
            use = self._use(h, asks, writes, written, most)
        if not use.shape[1]:  # nothing to learn from, and yet a gradient: see `_no_answer`
            return 0.0 * (logit.sum(dim=1) if by_sequence else logit.sum())
        use = use.gather(1, written.last.clamp(min=0))
        return self.salience.loss(logit, use, self.config.write_price, writes, by_sequence=by_sequence)

    def _use(self, h: Tensor, asks: Tensor, writes: Tensor, written: Written, most: int | None = None) -> Tensor:
        """Squared attention weight that each place of the buffer got, summed over readers, mean over heads; (B, S)."""
        asks = asks & self.can_read(written)
        if fused_read.usable(h, self.config.n_heads):
            return self._use_fused(h, asks, writes, written, most)
        if most is not None or launches.bind(h.device):
            return self._use_together(h, asks, writes, written, most)
        rows = [slice(b, b + 1) for b in range(len(h))]
        parts = [Written(Buffer(*(t[row] for t in written.buffer)), written.last[row]) for row in rows]
        use = [self._use_together(h[r], asks[r], writes[r], part) for r, part in zip(rows, parts, strict=True)]
        return torch.cat(use) if use else written.buffer.times

    def _use_fused(self, h: Tensor, asks: Tensor, writes: Tensor, written: Written, most: int | None) -> Tensor:
        """`_use` by the fused kernel."""
        buffer = written.buffer
        chosen = first_tokens(asks, most)
        last = take(written.last, chosen, -1)
        own = last.where(writes.gather(1, chosen.token), -1)
        filled = None if written.gapless else buffer.filled
        q = self.w_query(take(h, chosen))
        return fused_read.use(q, last, own, buffer.keys, filled, self.config.n_heads, self.config.capacity)

    def _use_together(
        self, h: Tensor, asks: Tensor, writes: Tensor, written: Written, most: int | None = None
    ) -> Tensor:
        """`_use` of all sequences at once, each filled up to the one that asks most."""
        buffer, heads = written.buffer, (self.config.n_heads, -1)
        use = buffer.keys.new_zeros(buffer.filled.shape)
        k = buffer.keys.unflatten(-1, heads)
        places = torch.arange(buffer.n_places, device=h.device)
        token, there, _ = first_tokens(asks, most)
        there = torch.ones_like(token, dtype=torch.bool) if there is None else there
        size = max(128, _MOST_WEIGHTS // max(1, buffer.filled.numel() * heads[0]))  # so that memory stays bounded
        for some, present in zip(token.split(size, dim=1), there.split(size, dim=1), strict=True):
            last = written.last.gather(1, some).clamp(min=0)  # -1 only where filled up
            q = self.w_query(take(h, Chosen(some, None, None))).unflatten(-1, heads)
            visible = visible_places(buffer.filled, last, self.config.capacity)[:, None]
            scores = torch.einsum("brhd,bshd->bhrs", q, k) / q.shape[-1] ** 0.5
            weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
            own = writes.gather(1, some)[..., None] & (places == last[..., None])  # to itself it needs no buffer
            use += weights.square().mean(dim=1).masked_fill(own | ~present[..., None], 0.0).sum(dim=1)
        return use


def _few_calls(h: Tensor) -> bool:
    """Whether calls count more than filled-up places: on an accelerator, and in a graph, which breaks at each."""
    return launches.bind(h.device) or torch.compiler.is_compiling()


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
