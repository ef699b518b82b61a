"""Episodic memory: attention over a bounded buffer of past tokens (Eq. 3), scored only for the tokens that read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


@dataclass(frozen=True, kw_only=True)
class EpisodicMemoryConfig:
    """Sizes of the episodic memory.

    Attributes:
        n_heads: attention heads.
        capacity: M, entries kept; None keeps all. Every valid token is written; when full, the oldest entry goes
            (ours: the paper says "novel events" without a rule). 4,096: twice the paper's sequence, so that nothing
            that a query asks for has been evicted.
    """

    n_heads: int = 4
    capacity: int | None = 4096

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.n_heads < 1:
            raise ValueError(f"episodic.n_heads = {self.n_heads} must be at least 1")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"episodic.capacity = {self.capacity} must be at least 1, or None to keep everything")


class EpisodicMemory(nn.Module):
    """Writes every token into a buffer; reads for those tokens only that ask.

    A token sees itself and the entries written before it, as long as fewer than `capacity` have been written since.

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

    def initial_buffer(self, n_batch: int) -> Buffer:
        """A buffer without entries."""
        empty = self.w_key.weight.new_zeros(n_batch, 0, self.w_key.out_features)
        return Buffer(
            keys=empty, values=empty, times=empty[..., 0], filled=torch.zeros_like(empty[..., 0], dtype=torch.bool)
        )

    def write(self, h: Tensor, gaps: Tensor, buffer: Buffer, valid: Tensor | None) -> Buffer:
        """The buffer followed by all tokens of this call, before any eviction.

        Args:
            h: (B, T, D).
            gaps: (B, T); zero on padding.
            buffer: from `initial_buffer` or `evict`.
            valid: false on padding, which is not written; (B, T).
        """
        if valid is None:
            valid = torch.ones_like(gaps, dtype=torch.bool)
        now = gaps.cumsum(dim=-1)
        total = now[:, -1:]
        return Buffer(
            keys=torch.cat([buffer.keys, self.w_key(h)], dim=1),
            values=torch.cat([buffer.values, self.w_value(h)], dim=1),
            times=torch.cat([buffer.times + total, total - now], dim=1),
            filled=torch.cat([buffer.filled, valid], dim=1),
        )

    def evict(self, buffer: Buffer) -> Buffer:
        """The newest `capacity` entries of each sequence, without the empty places that all sequences share."""
        n_filled = int(buffer.filled.sum(dim=1).max()) if buffer.n_places else 0
        keep = n_filled if self.config.capacity is None else min(n_filled, self.config.capacity)
        if keep == buffer.n_places:
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

    def read(self, h: Tensor, reads: Tensor | None, written: Buffer) -> Tensor:
        """Attention over the buffer for the tokens that read (Eq. 3).

        Args:
            h: tokens of this call, (B, T, D): the last T entries of `written`.
            reads: which tokens read, bool (B, T); None: all.
            written: from `write`.

        Returns:
            (B, T, D); zero where a token did not read. Only reading tokens are projected and scored.
        """
        n_before = written.n_places - h.shape[1]
        if reads is None:
            sees_all = self.config.capacity is None or self.config.capacity >= written.n_places
            if n_before == 0 and sees_all and bool(written.filled.all()):
                return self._attend(h, written, None)
            place = torch.arange(n_before, written.n_places, device=h.device).expand(h.shape[:2])
            return self._attend(h, written, visible_places(written.filled, place, self.config.capacity))
        if h.device.type != "cpu":
            return self._read_padded(h, reads, written)
        # Sequence by sequence, so that rows with few reads are not filled up to the row with most.
        answers, tokens = [h.new_zeros(0, h.shape[-1])], []
        for b, row in enumerate(reads):
            token = row.nonzero().squeeze(-1)
            tokens.append(token + b * len(row))
            if len(token):
                one = Buffer(*(part[b : b + 1] for part in written))
                visible = visible_places(one.filled, (token + n_before)[None], self.config.capacity)
                answers.append(self._attend(h[b : b + 1, token], one, visible)[0])
        found = torch.cat(answers)
        return found.new_zeros(reads.numel(), h.shape[-1]).index_copy(0, torch.cat(tokens), found).view_as(h)

    def _read_padded(self, h: Tensor, reads: Tensor, written: Buffer) -> Tensor:
        """All sequences at once, each filled up to the one with most reads: more work, but few launches."""
        counts = reads.sum(dim=1)
        order = (~reads).to(torch.int8).argsort(dim=1, stable=True)[:, : int(counts.max())]  # (B, R), reads in front
        wide = order[..., None].expand(-1, -1, h.shape[-1])
        place = order + written.n_places - h.shape[1]
        found = self._attend(h.gather(1, wide), written, visible_places(written.filled, place, self.config.capacity))
        real = torch.arange(order.shape[1], device=h.device) < counts[:, None]
        return found.new_zeros(h.shape).scatter(1, wide, torch.where(real[..., None], found, 0.0))

    def _attend(self, h: Tensor, written: Buffer, visible: Tensor | None) -> Tensor:
        """Multi-head attention; `visible` None means plain causal over equal lengths."""
        heads = (self.config.n_heads, -1)
        q = self.w_query(h).unflatten(-1, heads).transpose(1, 2)  # (B, H, R, Dh)
        k = written.keys.unflatten(-1, heads).transpose(1, 2)
        v = written.values.unflatten(-1, heads).transpose(1, 2)
        mask = None if visible is None else visible[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None)
        return self.w_out(y.transpose(1, 2).flatten(2))


def visible_places(filled: Tensor, place: Tensor, capacity: int | None) -> Tensor:
    """Which places of a buffer each token may see.

    Args:
        filled: bool (B, S).
        place: the place that each token itself was written to, (B, R).
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
