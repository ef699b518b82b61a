"""The reference implementation of all attention in this folder: every reader against every entry, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.ops.read.visibility import visible_places


def attend(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Attention by definition; arguments and result as in `attention.attend`."""
    weights = _weights(q, last, keys, filled, n_heads, capacity)
    y = weights @ values.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return y.transpose(1, 2).flatten(2) * (last >= 0)[..., None]


def use(
    q: Tensor, last: Tensor, own: Tensor, keys: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Squared attention weights by definition; arguments and result as in `attention.use`."""
    weights = _weights(q, last, keys, filled, n_heads, capacity)
    is_own = torch.arange(keys.shape[1], device=q.device) == own[..., None]
    dropped = is_own | (last < 0)[..., None]
    return weights.square().mean(dim=1).masked_fill(dropped, 0.0).sum(dim=1)


def _weights(
    q: Tensor, last: Tensor, keys: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Attention weights, (B, H, R, S)."""
    q, k = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in (q, keys))
    visible = visible_places(last.clamp(min=0), keys.shape[1], filled, capacity)[:, None]
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1)
