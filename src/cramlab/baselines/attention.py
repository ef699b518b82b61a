"""Multi-head attention over given keys, shared by the baselines that attend."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def check_heads(n_heads: int, d_model: int) -> None:
    """Raises `ValueError` unless the width can be shared among the heads."""
    if d_model % n_heads:
        raise ValueError(
            f"model.mixer.n_heads = {n_heads} does not divide model.d_model = {d_model}; change one of them"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention.

    Args:
        q: (B, T, D).
        k: (B, S, D).
        v: (B, S, D).
        n_heads: heads that share D.
        mask: who may see whom, bool (B, T, S) or (T, S); None: causal over equal lengths.

    Returns:
        (B, T, D), before any output projection.
    """
    q, k, v = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T or S, Dh)
    heads = None if mask is None else mask[..., None, :, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=heads, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)
