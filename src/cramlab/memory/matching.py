"""Queries and keys as attention compares them: an RMS norm per head, then a rotation by position, each an option."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Matching(nn.Module):
    """Turns projected tokens into queries and keys; without norm and rotation they stay as they are.

    The rotation turns pair i of a head, made of channels i and d_head / 2 + i, by `position * theta ** (-2 i / d_head)`
    radians, so that a score depends on the difference of two positions. Keys are rotated when they are written and
    stay valid in any cache. Source: RoFormer (arXiv 2104.09864); norms of queries and keys: arXiv 2302.05442.
    """

    def __init__(self, n_heads: int, d_head: int, *, norm: bool, theta: float | None) -> None:
        """Takes the sizes, whether to normalise, and the base of the wavelengths; None: no rotation."""
        super().__init__()
        self.n_heads, self.theta = n_heads, theta
        self.query_scale = nn.Parameter(torch.ones(d_head)) if norm else None
        self.key_scale = nn.Parameter(torch.ones(d_head)) if norm else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the scales of the norms to one."""
        for scale in self.parameters():
            scale.fill_(1)

    def query(self, projected: Tensor, position: Tensor | None) -> Tensor:
        """Queries (..., D) from projected tokens (..., D) at positions (...); None: no rotation."""
        return self._matched(projected, self.query_scale, position)

    def key(self, projected: Tensor, position: Tensor | None) -> Tensor:
        """Keys (..., D), as in `query`."""
        return self._matched(projected, self.key_scale, position)

    def _matched(self, projected: Tensor, scale: Tensor | None, position: Tensor | None) -> Tensor:
        if scale is None and position is None:
            return projected
        exact = torch.promote_types(projected.dtype, torch.float32)
        heads = projected.unflatten(-1, (self.n_heads, -1)).to(exact)
        if scale is not None:
            heads = F.rms_norm(heads, scale.shape, scale.to(exact), 1e-6)
        if position is not None:
            heads = self._rotated(heads, position)
        return heads.flatten(-2).to(projected.dtype)

    def _rotated(self, heads: Tensor, position: Tensor) -> Tensor:
        """Heads (..., H, d_head), each pair of channels turned by its angle."""
        assert self.theta is not None
        half = heads.shape[-1] // 2
        exponent = torch.arange(half, device=heads.device, dtype=heads.dtype) / half
        angle = position[..., None, None] * self.theta**-exponent
        cos, sin = angle.cos(), angle.sin()
        a, b = heads.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
