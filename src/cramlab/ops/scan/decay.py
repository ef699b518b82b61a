"""The linear recurrence `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]`, whatever computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.ops.scan import chunked, fused


def decay_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, *, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """Solves `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]` for all t.

    Args:
        u: inputs, (B, T, G, E): G timescales with E channels each.
        gaps: time since the previous token, (B, T), >= 0.
        rates: one decay rate per timescale, in 1 / time units, (G,), > 0.
        state: s before the first token, (B, G, E).
        chunk: number of tokens in a chunk, at least 2; the kernels use chunks of their own.

    Returns:
        s at every token, (B, T, G, E), in the type of u; and s after the last token, (B, G, E), in at least 32 bits.

    Source: ours (the paper leaves open how state passes between tokens).
    """
    if u.shape[1] == 0:
        return u, state
    # A decay close to 1 does not survive in 16 bits, nor does a state that is rounded at every token.
    exact = torch.promote_types(u.dtype, torch.float32)
    gaps, rates, state = (t.to(exact) for t in (gaps, rates, state))
    if u.shape[1] == 1:  # a decoding step: the definition itself
        s = (torch.exp(-rates * gaps.clamp(max=chunked.LONGEST_GAP))[..., None] * state + u[:, 0].to(exact))[:, None]
    elif fused.usable(u):
        s = fused.decay_scan(u, gaps, rates, state)
    else:
        s = chunked.decay_scan(u.to(exact), gaps, rates, state, chunk)
    return s.to(u.dtype), s[:, -1]
