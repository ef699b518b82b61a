"""The reference implementation of `heads.convolved_heads`, in PyTorch. It runs where no kernel does."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def convolved_heads(x: Tensor, taps: Tensor, before: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `heads.convolved_heads` by shifted products.

    They fuse into one pass; a depthwise convolution of cuDNN takes several times as long.
    """
    n_tokens = x.shape[1]
    history = torch.cat([before.to(x.dtype), x], dim=1) if before.shape[1] else x
    first, *others = taps.to(x.dtype).unbind(1)
    found = first * history[:, :n_tokens]
    for i, tap in enumerate(others, start=1):
        found = found + tap * history[:, i : i + n_tokens]
    q, k, v = (part.unflatten(-1, (n_heads, -1)) for part in F.silu(found).chunk(3, dim=-1))
    exact = torch.promote_types(x.dtype, torch.float32)
    q, k = (F.normalize(t.to(exact), dim=-1) for t in (q, k))
    return (q / math.sqrt(q.shape[-1])).to(x.dtype), k.to(x.dtype), v
