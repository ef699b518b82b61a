"""The gated delta rule: a matrix-valued state that is corrected, not only added to, and that fades over time gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.ops.scan import delta_fused, delta_naive

FLOOR = -40.0  # smallest logarithm of a decay: exp(-40) leaves less than the rounding of 32 bits
_CHUNK = 64  # tokens of a chunk


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """Solves `S[t] = a[t] S[t-1] + b[t] k[t] (v[t] - a[t] S[t-1]' k[t])'` and returns `S[t]' q[t]`, for all t.

    Inside a chunk the corrections obey a triangular system, which is solved for all chunks at once; the state then
    passes from chunk to chunk, which alone is sequential. Nothing is divided by a decay. Work is O(T chunk (K + V) +
    T K V) per head.

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
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, state = (t.to(exact) for t in (q, k, v, beta, log_decay, state))
        parts = [_in_chunks(t, chunk) for t in (q, k, v, beta[..., None], log_decay.clamp(min=FLOOR)[..., None])]
        q, k, v, beta, steps = parts  # (N, M, C, ...): a chunk that is not full ends in tokens that change nothing
        earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()  # or the same token
        # Logarithm of what is left at a token of the state before the chunk; CUDA has no deterministic cumulative sum.
        since = (steps.transpose(-1, -2) * earlier).sum(dim=-1, keepdim=True)
        between = since - since.transpose(-1, -2)  # from the column's token to the row's
        decays = between.masked_fill(~earlier, float("-inf")).exp()
        left = since.exp()
        way = delta_fused if delta_fused.usable(k, chunk) else delta_naive
        # Corrections U of a chunk: (1 + L) U = b (V - left K S), with L strictly lower triangular.
        own, seen = way.solve(beta * (k @ k.transpose(-1, -2)) * decays, beta * v, beta * left * k)
        kept, ends = (since[..., -1:, :] - since).exp() * k, left[..., -1, 0]
        before, corrections, last = way.pass_state(own, seen, kept, ends, state.flatten(0, 1))
        answers = (left * q) @ before + (q @ k.transpose(-1, -2) * decays) @ corrections
        found = answers.unflatten(1, state.shape[:2]).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :n_tokens]
        state = last.view_as(state)
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


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """Splits (B, T, H, E) into chunks, (N, B H, chunk, E), with zeros after the last token."""
    missing = -x.shape[1] % chunk
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2)
