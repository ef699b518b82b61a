"""Moves padding behind the valid tokens, so that a causal mixer never meets padding before a token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Sequences whose valid tokens come first.

    Attributes:
        x: (B, T, D); zeros behind each sequence's end.
        lengths: number of valid tokens, (B,).
        order: original index of each packed token, (B, T); None: nothing was moved.
    """

    x: Tensor
    lengths: Tensor
    order: Tensor | None

    @property
    def valid(self) -> Tensor:
        """True for valid tokens, bool (B, T)."""
        return torch.arange(self.x.shape[1], device=self.x.device) < self.lengths[:, None]

    def unpack(self, y: Tensor) -> Tensor:
        """Restores the original order of y, (B, T, D) or (B, T), with zeros on padding."""
        if self.order is None:
            return y
        valid, order = self.valid, self.order
        if y.ndim == 3:
            valid, order = valid[..., None], order[..., None].expand_as(y)
        return torch.zeros_like(y).scatter(1, order, torch.where(valid, y, torch.zeros_like(y)))


def pack(x: Tensor, valid: Tensor | None) -> Packed:
    """Packs x (B, T, D) by `valid`, bool (B, T); None: all tokens are valid."""
    if valid is None:
        return Packed(x=x, lengths=torch.full((x.shape[0],), x.shape[1], device=x.device), order=None)
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    packed = Packed(x=x.gather(1, order[..., None].expand_as(x)), lengths=valid.sum(dim=1), order=order)
    return packed._replace(x=torch.where(packed.valid[..., None], packed.x, 0.0))


def last_tokens(x: Tensor, lengths: Tensor, n: int) -> Tensor:
    """The last `n` tokens of each sequence, (B, n, D), from x (B, n + T, D) with `lengths` counted from the n-th on."""
    place = lengths[:, None] + torch.arange(n, device=x.device)
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
