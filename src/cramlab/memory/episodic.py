"""Episodic memory: attention over a bounded buffer of past tokens (Eq. 3), scored only for the tokens that read.

Only written tokens get keys and values, and only reading tokens get queries. Who reads, and how reads are executed, is
in `readers`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Count, Positive, Share, Size, checked
from cramlab.memory.buffer import Buffer, Written, empty_buffer
from cramlab.memory.matching import Matching
from cramlab.memory.readers import Readers
from cramlab.memory.write_gate import SalienceGate
from cramlab.ops import dispatch
from cramlab.ops.select.tokens import first_tokens, running_sum, take
from cramlab.ranks import count_over_ranks

WriteRule = Literal["all", "salience"]


@checked("model.mixer.episodic")
class EpisodicMemoryConfig:
    """Sizes of the episodic memory, and which tokens are written.

    Attributes:
        n_heads: number of attention heads.
        capacity: M, number of entries kept per sequence; None keeps all. A full buffer evicts its oldest entry (ours:
            the paper says "novel events" without a rule). 4,096 is twice the length of the paper's sequences, so
            nothing that a query asks for has been evicted.
        write: "all" writes every valid token; "salience" writes the tokens that a learned gate expects to be read.
        write_price: least expected use (see `SalienceGate`) for which an entry is worth its slot.
        write_audit_frac: share of the tokens refused by the gate that training writes anyway, 0 to 1.
        rope: rotary positions of queries and keys. The position of a token is the number of entries of its sequence
            written before it, so that padding and tokens refused by a write gate take none, and time gaps do not count.
        rope_theta: base of the wavelengths of rotary positions.
        qk_norm: RMS norm of each head's queries and keys, with a learned scale.
    """

    n_heads: Size = 4
    capacity: Count | None = 4096
    write: WriteRule = "all"
    write_price: Positive = 0.02
    write_audit_frac: Share = 0.1
    rope: bool = False
    rope_theta: Positive = 10000.0
    qk_norm: bool = False


class EpisodicMemory(nn.Module):
    """Writes tokens into a buffer, and reads from it for the tokens that ask.

    A token sees the entries written up to and including itself that are among the newest `capacity`. With
    `write="salience"`, a token that was not written does not see itself.

    Source: paper sec. 4, Eq. 3. Differs: several heads; entries carry no read count, since eviction by age needs none.
    """

    def __init__(self, config: EpisodicMemoryConfig, d_model: int) -> None:
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(
                f"episodic.n_heads = {config.n_heads} does not divide d_model = {d_model}; change one of them"
            )
        d_head = d_model // config.n_heads
        if config.rope and d_head % 2:
            raise ValueError(
                f"episodic.rope = True needs heads of an even width, not d_model / episodic.n_heads = {d_head}; "
                "change one of them"
            )
        self.config = config
        theta = config.rope_theta if config.rope else None
        self.matching = Matching(config.n_heads, d_head, norm=config.qk_norm, theta=theta)
        self.w_query = nn.Linear(d_model, d_model, bias=False)
        self.w_key = nn.Linear(d_model, d_model, bias=False)
        self.w_value = nn.Linear(d_model, d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)
        self.salience = SalienceGate(d_model) if config.write == "salience" else None

    def initial_buffer(self, n_batch: int, like: Tensor | None = None) -> Buffer:
        """A buffer without entries, with the type and device of `like` (..., D), or of the parameters if None."""
        return empty_buffer(n_batch, self.w_key.weight if like is None else like)

    def write(
        self, h: Tensor, gaps: Tensor, buffer: Buffer, writes: Tensor | None, *, most: int | None = None
    ) -> Written:
        """Appends tokens to the buffer. With a write gate, only written tokens get keys and values.

        Args:
            h: (B, T, D).
            gaps: time since the previous token, (B, T); zero on padding.
            buffer: from `initial_buffer` or `evict`.
            writes: the tokens to write, never padding, bool (B, T); None: all.
            most: only the first `most` of these tokens of each sequence are written, and the buffer grows by `most`
                slots, so no size depends on a gate; None: all of them are written.
        """
        n_before, n_tokens = buffer.n_places, h.shape[1]
        now = running_sum(gaps)
        total = now[:, -1:]
        position = self._positions(h, buffer, writes, most) if self.config.rope else None
        if self.salience is None:  # every token gets a slot, padding too, so no gather is needed
            filled = torch.ones_like(gaps, dtype=torch.bool) if writes is None else writes
            n_new = torch.full_like(buffer.n_written, n_tokens) if writes is None else filled.sum(dim=1)
            new = Buffer(self.keys(h, position), self.w_value(h), total - now, filled, n_new)
            last = torch.arange(n_before, n_before + n_tokens, device=h.device).expand(h.shape[:2])
            gapless = full = not n_before and writes is None
        else:
            writes = torch.ones_like(gaps, dtype=torch.bool) if writes is None else writes
            new, rank = self._packed(h, total - now, position, writes, most)
            last = (rank if most is None else rank.clamp(max=most)) + (n_before - 1)
            gapless, full = not n_before, not n_before and len(h) == 1 and most is None
        grown = Buffer(
            keys=_joined(buffer.keys, new.keys),
            values=_joined(buffer.values, new.values),
            times=_joined(buffer.times + total, new.times) if n_tokens else buffer.times,
            filled=_joined(buffer.filled, new.filled),
            n_written=buffer.n_written + new.n_written,
        )
        return Written(
            buffer=grown, last=last, gapless=gapless, full=full, one_each=self.salience is None, position=position
        )

    def keys(self, h: Tensor, position: Tensor | None) -> Tensor:
        """Keys of tokens h (..., D) at positions (...), which only `rope` needs; (..., D)."""
        return self.matching.key(self.w_key(h), position)

    def queries(self, h: Tensor, position: Tensor | None) -> Tensor:
        """Queries of tokens, as in `keys`."""
        return self.matching.query(self.w_query(h), position)

    def _positions(self, h: Tensor, buffer: Buffer, writes: Tensor | None, most: int | None) -> Tensor:
        """`Written.position`, int64 (B, T); arguments as in `write`."""
        if writes is None:
            within = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
        else:
            within = running_sum(writes) - writes.long()
        return buffer.n_written[:, None] + (within if most is None else within.clamp(max=most))

    def _packed(
        self, h: Tensor, ages: Tensor, position: Tensor | None, writes: Tensor, most: int | None
    ) -> tuple[Buffer, Tensor]:
        """Entries of the written tokens, in order, and the rank of each token among them, (B, T)."""
        if most is not None or dispatch.few_launches(h.device):  # project padding too
            if most is None:
                most = int(writes.sum(dim=1).max()) if writes.numel() else 0
            chosen = first_tokens(writes, most)
            rows, place = take(h, chosen), None if position is None else take(position, chosen)
            n_new, filled = chosen.there.sum(dim=1), chosen.there
            return Buffer(self.keys(rows, place), self.w_value(rows), take(ages, chosen), filled, n_new), chosen.rank
        rank = running_sum(writes)
        most = int(rank[:, -1:].amax()) if writes.numel() else 0
        token = writes.flatten().nonzero().squeeze(-1)
        place = (rank - 1 + most * torch.arange(len(h), device=h.device)[:, None]).flatten()[token]
        rows = h.flatten(0, 1).index_select(0, token)

        def packed(entries: Tensor) -> Tensor:
            if len(h) == 1:  # there is no padding
                return entries[None]
            return (
                entries.new_zeros(len(h) * most, *entries.shape[1:])
                .index_copy(0, place, entries)
                .unflatten(0, (len(h), most))
            )

        filled = packed(torch.ones_like(token, dtype=torch.bool))
        keys = self.keys(rows, None if position is None else position.flatten()[token])
        ages = packed(ages.flatten()[token])
        return Buffer(packed(keys), packed(self.w_value(rows)), ages, filled, filled.sum(dim=1)), rank

    def evict(self, buffer: Buffer, *, full: bool = False, waits: bool = True) -> Buffer:
        """Keeps the newest `capacity` entries of each sequence; drops slots in front that are empty in all.

        Args:
            buffer: of `Written`.
            full: true if the buffer is known to have no empty slots.
            waits: whether to wait for the device to learn how many slots are empty in all sequences; if false, these
                slots stay, in front.
        """
        if full:
            excess = 0 if self.config.capacity is None else buffer.n_places - self.config.capacity
            if excess <= 0:
                return buffer
            keys, values, times, filled = (part[:, excess:].clone() for part in buffer[:4])
            return Buffer(keys, values, times, filled, buffer.n_written)
        n_filled = int(buffer.filled.sum(dim=1).max()) if buffer.n_places and waits else buffer.n_places
        keep = n_filled if self.config.capacity is None else min(n_filled, self.config.capacity)
        if waits and keep == buffer.n_places and bool((buffer.filled[:, 1:] >= buffer.filled[:, :-1]).all()):
            return buffer  # empty slots are in front already
        # A stable sort by "filled" moves empty slots to the front and keeps the order of the others.
        order = buffer.filled.to(torch.int8).argsort(dim=1, stable=True)[:, buffer.n_places - keep :]
        wide = order[..., None].expand(-1, -1, buffer.keys.shape[-1])
        return Buffer(
            keys=buffer.keys.gather(1, wide),
            values=buffer.values.gather(1, wide),
            times=buffer.times.gather(1, order),
            filled=buffer.filled.gather(1, order),
            n_written=buffer.n_written,
        )

    def can_read(self, written: Written) -> Tensor:
        """True for the tokens that see at least one entry, bool (B, T). With `write="all"` each token sees itself."""
        if self.salience is None:
            return torch.ones_like(written.last, dtype=torch.bool)
        if written.gapless:
            return written.last >= 0
        n_seen = F.pad(written.buffer.filled.long().cumsum(dim=1), (1, 0))
        return n_seen.gather(1, written.last + 1) > 0

    def read(self, h: Tensor, readers: Readers, written: Written, newest: int | None = None) -> Tensor:
        """Attention over the buffer for the tokens that read (Eq. 3): rows of `readers`, of width D.

        Only these tokens are projected and scored. Rows without a reader are arbitrary.

        Args:
            h: tokens of the call that made `written`, (B, T, D).
            readers: tokens that read, all of which can.
            written: from `write`.
            newest: a reader sees the newest `newest` entries, at most `capacity`; None: `capacity` of them.
        """
        q = self._asked(h, readers, written)
        return self.w_out(readers.attend(q, written, self.config.n_heads, newest or self.config.capacity))

    def _asked(self, h: Tensor, readers: Readers, written: Written) -> Tensor:
        """Queries of the tokens that read, in the layout of `readers`."""
        return self.queries(readers.take(h), None if written.position is None else readers.take(written.position))

    def use(self, h: Tensor, askers: Readers, writes: Tensor, written: Written) -> Tensor:
        """Squared attention weight of each slot of the buffer, summed over `askers`, mean over heads, (B, S).

        The weight of a token's own entry does not count: to read itself, a token needs no buffer.
        """
        own = written.last.where(writes, -1)
        return askers.use(self._asked(h, askers, written), own, written, self.config.n_heads, self.config.capacity)

    def salience_loss(
        self, logit: Tensor, h: Tensor, askers: Readers, writes: Tensor, written: Written, *, by_sequence: bool = False
    ) -> Tensor:
        """Loss of the write gate, from how much the entries of this call were used in it. Scalar.

        Args:
            logit: of the gate, (B, T).
            h: as in `write`.
            askers: tokens whose reads count: those that would also read when decoding.
            writes: as in `write`.
            written: from `write`.
            by_sequence: return the sum over the tokens of each sequence, (B,), instead of the mean.
        """
        assert self.salience is not None
        with torch.no_grad():
            use = self.use(h, askers, writes, written)
        if not use.shape[1]:  # nothing to learn from, but other ranks wait for gradients and counts
            count_over_ranks(writes.sum())
            return 0.0 * (logit.sum(dim=1) if by_sequence else logit.sum())
        use = use.gather(1, written.last.clamp(min=0))
        return self.salience.loss(logit, use, self.config.write_price, writes, by_sequence=by_sequence)


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Concatenation along the slots; no copy if nothing is old, or nothing is new and no gradient has to pass."""
    if not new.shape[1] and not new.requires_grad:
        return old
    return torch.cat([old, new], dim=1) if old.shape[1] else new
