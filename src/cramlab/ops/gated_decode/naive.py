"""The reference implementation of decoding behind a gate: every key is scored and masked, in plain PyTorch.

No value is read on the host and all shapes are fixed, so it can be recorded or compiled as the kernels can.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_MASS = -1e30  # log-sum-exp of no scores; finite, so that no difference is NaN


def near_read(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, window: int, n_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the near keys; arguments and result as in `attention.near_read`."""
    places, sinks = _places(key, first), _sinks(key, first, end, n_sinks)
    recent = (places >= (end - window)[:, None]) & (places < end[:, None]) & (places >= first[:, None]) & ~sinks
    scores = _scores(query, key, scale)
    masses = torch.stack([_log_sum(scores, visible) for visible in (recent, sinks)], dim=1)
    return _attention(scores, recent | sinks, value), masses


def gated_read(
    near: tuple[Tensor, Tensor], reads: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor,
    window: int, n_sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Full attention where a gate is open; arguments and result as in `attention.gated_read`."""
    full = full_read(query, key, value, first, end, scale)
    has_far = (end - first > window + n_sinks)[:, None]
    reads = (reads & has_far).expand(-1, key.shape[1]).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.where(reads[..., None], full, near[0])


def full_read(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Attention to all visible keys; arguments and result as in `attention.full_read`."""
    places = _places(key, first)
    return _attention(_scores(query, key, scale), (places >= first[:, None]) & (places < end[:, None]), value)


def _places(key: Tensor, first: Tensor) -> Tensor:
    """Positions of the keys, (1, S)."""
    return torch.arange(key.shape[2], device=first.device)[None]


def _sinks(key: Tensor, first: Tensor, end: Tensor, n_sinks: int) -> Tensor:
    """Which keys are a sequence's first ones, bool (B, S)."""
    places = _places(key, first)
    return (places >= first[:, None]) & (places < first[:, None] + n_sinks) & (places < end[:, None])


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scores of all keys in at least 32 bits, (B, H, S)."""
    products = query.unflatten(1, (key.shape[1], -1)) @ key.transpose(-1, -2)
    return products.flatten(1, 2).to(torch.promote_types(query.dtype, torch.float32)) * scale


def _attention(scores: Tensor, visible: Tensor, value: Tensor) -> Tensor:
    """Weighted sums of the values, (B, H, Dv)."""
    weights = scores.masked_fill(~visible[:, None], NO_MASS).softmax(dim=-1).to(value.dtype)
    return (weights.unflatten(1, (value.shape[1], -1)) @ value).flatten(1, 2)


def _log_sum(scores: Tensor, visible: Tensor) -> Tensor:
    """Log-sum-exp over the visible keys, (B, H); `NO_MASS` without any."""
    total = scores.masked_fill(~visible[:, None], -torch.inf).logsumexp(dim=-1)
    return total.clamp(min=NO_MASS)
