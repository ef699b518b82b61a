"""Multi-head attention of readers to the entries that each of them sees, whatever computes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.ops.read import fused
from cramlab.ops.read.visibility import visible_places

_MOST_WEIGHTS = 1 << 26  # attention weights that `use` holds at once


def dense(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Multi-head softmax attention by PyTorch's own kernels, (B, R, D).

    Args:
        q: queries, (B, R, D).
        k: keys, (B, S, D).
        v: values, (B, S, D).
        n_heads: number of heads that share D.
        mask: true where a query sees a key, bool (B, R, S) or (R, S); None: every query sees every key.
        causal: query t sees the keys 0 to t; not together with a mask.
    """
    q, k, v = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, R or S, D / H)
    mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)


def attend(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None,
    *, waits: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of R readers of each sequence, each to the entries that it sees, (B, R, D).

    Args:
        q: queries, (B, R, D).
        last: newest slot that each reader sees, int64 (B, R), not falling along a sequence; -1: there is no such
            reader, and its row of the result is arbitrary.
        keys: (B, S, D).
        values: (B, S, D).
        filled: false on empty slots, bool (B, S); None: all slots up to any `last` are filled.
        n_heads: number of heads that share D.
        capacity: a reader sees the newest `capacity` filled slots up to its `last`; None: all of them.
        waits: without a kernel, wait for the device in order to score hardly more slots than are seen.
    """
    if fused.usable(q, n_heads):
        return fused.attend(q, last, keys, values, filled, n_heads, capacity)
    last = last.clamp(min=0)
    size = min(256, max(32, q.shape[1] // 8)) if waits else q.shape[1]  # small blocks see less, large ones are faster
    answers = []
    for some, newest in zip(q.split(size, dim=1), last.split(size, dim=1), strict=True):
        n_seen = int(newest.amax()) + 1 if waits else keys.shape[1]
        seen = None if filled is None else filled[:, :n_seen]
        visible = visible_places(newest, n_seen, seen, capacity)
        answers.append(dense(some, keys[:, :n_seen], values[:, :n_seen], n_heads, visible))
    return torch.cat(answers, dim=1) if len(answers) > 1 else answers[0]


def use(
    q: Tensor, last: Tensor, own: Tensor, keys: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Squared attention weight of each slot, summed over the readers, mean over heads, (B, S). Without gradient.

    Args:
        q: as in `attend`.
        last: as in `attend`.
        own: slot of the reader's own entry, whose weight does not count, int64 (B, R); -1: it has none.
        keys: as in `attend`.
        filled: as in `attend`.
        n_heads: as in `attend`.
        capacity: as in `attend`.
    """
    if fused.usable(q, n_heads):
        return fused.use(q, last, own, keys, filled, n_heads, capacity)
    k = keys.unflatten(-1, (n_heads, -1))
    places = torch.arange(keys.shape[1], device=q.device)
    total = keys.new_zeros(keys.shape[:2])
    size = max(128, _MOST_WEIGHTS // max(1, total.numel() * n_heads))  # readers at a time, to bound the memory
    for some, newest, of_reader in zip(q.split(size, 1), last.split(size, 1), own.split(size, 1), strict=True):
        visible = visible_places(newest.clamp(min=0), keys.shape[1], filled, capacity)[:, None]
        some = some.unflatten(-1, (n_heads, -1))
        scores = torch.einsum("brhd,bshd->bhrs", some, k) / some.shape[-1] ** 0.5
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        dropped = (places == of_reader[..., None]) | (newest < 0)[..., None]
        total += weights.square().mean(dim=1).masked_fill(dropped, 0.0).sum(dim=1)
    return total
