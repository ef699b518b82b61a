"""The gated delta rule: a matrix-valued state that is corrected, not only added to, and that fades over time gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.ops.scan import delta_fused, delta_naive
from cramlab.ops.scan.delta_naive import FLOOR

_CHUNK = 64  # tokens of a chunk


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """Solves `S[t] = a[t] S[t-1] + b[t] k[t] (v[t] - a[t] S[t-1]' k[t])'` and returns `S[t]' q[t]`, for all t.

    Inside a chunk the corrections obey a triangular system, which is solved for all chunks at once; the state then
    passes from chunk to chunk, which alone is sequential. Nothing is divided by a decay. Work is O(T chunk (K + V) +
    T K V) per head. Computed by `delta_naive`, or by the kernels of `delta_fused` where they are usable.

    Args:
        q: queries, (B, T, H, K).
        k: keys, (B, T, H, K); of length at most 1, or the state can grow.
        v: values, (B, T, H, V).
        beta: strength b of each correction, (B, T, H), 0 to 1; 0 leaves the state to its decay alone.
        log_decay: logarithm of the decay a, (B, T, H), at most 0; taken as `FLOOR` below that.
        state: S before the first token, (B, H, K, V).
        chunk: tokens of a chunk.

    Returns:
        The outputs, (B, T, H, V), in the type of v; and S after the last token, in at least 32 bits.

    Source: Gated DeltaNet (arXiv 2412.06464), Eq. 10, in the chunked form of DeltaNet (arXiv 2406.06484); the decay
    over time gaps is ours.
    """
    n_tokens, kind = q.shape[1], v.dtype
    exact = torch.promote_types(kind, torch.float32)
    if n_tokens <= 1:
        return delta_rule_by_tokens(q, k, v, beta, log_decay, state)
    if delta_fused.usable(q, k, v, beta, log_decay, chunk=chunk):
        return delta_fused.delta_rule(q, k, v, beta, log_decay, state.float(), chunk)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, state = (t.to(exact) for t in (q, k, v, beta, log_decay, state))
        found, state = delta_naive.delta_rule(q, k, v, beta, log_decay, state, chunk)
    return found.to(kind), state


def delta_rule_by_tokens(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes `delta_rule` token by token: its definition, and a step of decoding."""
    kind = v.dtype
    exact = torch.promote_types(kind, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, state = (t.to(exact) for t in (q, k, v, beta, log_decay, state))
        answers = []
        for t in range(q.shape[1]):
            state = log_decay[:, t].clamp(min=FLOOR).exp()[..., None, None] * state
            recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            correction = beta[:, t, :, None] * (v[:, t] - recalled)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
            answers.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    found = torch.stack(answers, dim=1) if answers else v
    return found.to(kind), state


def delta_flops(d_key: int, d_value: int, chunk: int = _CHUNK) -> float:
    """FLOPs of `delta_rule` per token and head in full chunks: its matrix products, without the triangular solution."""
    return 2.0 * (2 * chunk * d_key + chunk * d_value + 3 * d_key * d_value)
