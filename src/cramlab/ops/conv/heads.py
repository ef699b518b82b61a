"""Queries, keys and values of a recurrence, from one projection and a short causal convolution."""

from __future__ import annotations

from torch import Tensor

from cramlab.ops.conv import fused, naive


def convolved_heads(x: Tensor, taps: Tensor, before: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Convolves each channel over the tokens, applies SiLU, and scales queries and keys to fixed lengths.

    Computed by `naive`, or by the kernels of `fused` where they are usable, which read and write each number once.

    Args:
        x: queries, keys and values of all heads beside one another, (B, T, 3 H E).
        taps: weights of each channel, (3 H E, n); the last one is that of the token itself.
        before: the n - 1 inputs before the first token, (B, n - 1, 3 H E).
        n_heads: number of heads, H.

    Returns:
        Queries of length 1 / sqrt(E), keys of length 1, and values, each (B, T, H, E) in the type of x.

    Source: the inputs of Gated DeltaNet (arXiv 2412.06464); the kernels are ours.
    """
    way = fused if fused.usable(x, taps, before, n_heads) else naive
    return way.convolved_heads(x, taps, before, n_heads)
