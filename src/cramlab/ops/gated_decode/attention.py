"""Decoding behind a gate, whatever computes it: fused kernels on CUDA, the reference implementation elsewhere.

Positions live on the device, so that a step with fixed shapes can be recorded once and replayed as sequences grow. The
visible keys of a sequence are `first <= place < end`; the newest token's own key is the last of them. Its near keys are
the last `window` and the first `n_sinks` of these, its far keys are the others.
"""

from __future__ import annotations

from torch import Tensor

from cramlab.ops.gated_decode import fused, naive


def near_read(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, window: int, n_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of the newest token of each sequence to its near keys. Without gradient on CUDA.

    Args:
        query: (B, H, D).
        key: static buffer of keys, (B, H / G, S, D), contiguous; only `first` to `end` of a sequence are read.
        value: as `key`.
        first: position of each sequence's first visible key, int64 (B,).
        end: position behind the newest key of each sequence, int64 (B,).
        window: number of most recent keys, at least 1.
        n_sinks: number of first keys.
        scale: factor of the scores.

    Returns:
        Outputs of the heads, (B, H, D), and the log-sum-exp of the scores over the window and over the first keys,
        in at least 32 bits, (B, 2, H); `naive.NO_MASS` where there is no such key.
    """
    way = fused if fused.usable(query, key) else naive
    return way.near_read(query, key, value, first, end, window, n_sinks, scale)


def gated_read(
    near: tuple[Tensor, Tensor], reads: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor,
    window: int, n_sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Full attention where a gate is open and there are far keys, else the near heads, (B, H, D).

    The kernel loads no far key of a sequence, or of one of its KV heads, whose gate is shut. Without gradient on CUDA.

    Args:
        near: what `near_read` returned for the other arguments.
        reads: whether a gate is open, bool (B, H / G), or (B, 1) for all heads of a sequence.
        query: as in `near_read`.
        key: as in `near_read`.
        value: as in `near_read`.
        first: as in `near_read`.
        end: as in `near_read`.
        window: as in `near_read`.
        n_sinks: as in `near_read`.
        scale: as in `near_read`.
    """
    way = fused if fused.usable(query, key) else naive
    return way.gated_read(near, reads, query, key, value, first, end, window, n_sinks, scale)


def full_read(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Attention to all visible keys, (B, H, D): split-K flash decoding. Arguments as in `near_read`."""
    way = fused if fused.usable(query, key) else naive
    return way.full_read(query, key, value, first, end, scale)
