"""The buffer of the episodic memory, and what the tokens of a call can read from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Buffer(NamedTuple):
    """Entries that have been written and not yet evicted, oldest first.

    Attributes:
        keys: (B, S, D).
        values: (B, S, D).
        times: time since the entry was written, (B, S).
        filled: false on empty slots, bool (B, S).
        n_written: number of entries written so far, evicted ones included, int64 (B,).
    """

    keys: Tensor
    values: Tensor
    times: Tensor
    filled: Tensor
    n_written: Tensor

    @property
    def n_places(self) -> int:
        """Number of slots, filled or empty, in each sequence: S."""
        return self.keys.shape[1]

    @property
    def n_bytes(self) -> int:
        """Size in bytes, of all sequences together."""
        return sum(part.numel() * part.element_size() for part in self)


def empty_buffer(n_batch: int, like: Tensor) -> Buffer:
    """A buffer without entries, with the width, type and device of `like` (..., D)."""
    empty = like.new_zeros(n_batch, 0, like.shape[-1])
    filled = torch.zeros_like(empty[..., 0], dtype=torch.bool)
    n_written = torch.zeros(n_batch, dtype=torch.int64, device=like.device)
    return Buffer(keys=empty, values=empty, times=empty[..., 0], filled=filled, n_written=n_written)


class Written(NamedTuple):
    """What the tokens of a call can read: the buffer after their writes, before any eviction.

    Attributes:
        buffer: entries from before the call and of the call.
        last: newest slot that each token of the call may see, int64 (B, T); -1: none.
        gapless: all slots up to any `last` are known to be filled, without waiting for the device.
        full: all slots are known to be filled, without waiting for the device.
        one_each: every token of the call has a slot, filled or empty: its `last`.
        position: number of entries of the sequence written before each token, in any call and evicted ones included,
            int64 (B, T); None: attention uses no positions. For a written token this is its index among the entries.
    """

    buffer: Buffer
    last: Tensor
    gapless: bool = False
    full: bool = False
    one_each: bool = False
    position: Tensor | None = None

    @property
    def filled(self) -> Tensor | None:
        """`buffer.filled`; None if all slots up to any `last` are known to be filled."""
        return None if self.gapless else self.buffer.filled

    def is_causal(self, capacity: int | None) -> bool:
        """True if token t sees exactly the slots 0 to t. May wait for the device."""
        if not self.one_each or self.buffer.n_places != self.last.shape[1]:
            return False
        if capacity is not None and capacity < self.buffer.n_places:
            return False
        return self.gapless or bool(self.buffer.filled.all())
