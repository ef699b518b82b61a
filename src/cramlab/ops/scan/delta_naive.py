"""The reference implementation of the delta rule in chunks, in PyTorch. It runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = -40.0  # smallest logarithm of a decay: exp(-40) leaves less than the rounding of 32 bits


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Computes `delta.delta_rule` by batched products over all chunks and a loop that passes the state over them.

    All arguments have the same type, of at least 32 bits. With S the state before a chunk, its corrections U solve
    `(1 + L) U = b (V - left K S)`, where L is strictly lower triangular, and its outputs are
    `left Q S + (Q K' * decays) U`.
    """
    n_tokens, sizes = q.shape[1], state.shape
    parts = [_in_chunks(t, chunk) for t in (q, k, v, beta[..., None], log_decay.clamp(min=FLOOR)[..., None])]
    q, k, v, beta, steps = parts  # (N, M, C, ...): a chunk that is not full ends in tokens that change nothing
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()  # or the same token
    # Logarithm of what is left at a token of the state before the chunk; CUDA has no deterministic cumulative sum.
    since = (steps.transpose(-1, -2) * earlier).sum(dim=-1, keepdim=True)
    between = since - since.transpose(-1, -2)  # from the column's token to the row's
    decays = between.masked_fill(~earlier, float("-inf")).exp()
    left = since.exp()
    own, seen = _solve(beta * (k @ k.transpose(-1, -2)) * decays, beta * v, beta * left * k)
    kept, ends = (since[..., -1:, :] - since).exp() * k, left[..., -1, 0]
    before, corrections, last = pass_state(own, seen, kept, ends, state.flatten(0, 1))
    found = (left * q) @ before + (q @ k.transpose(-1, -2) * decays) @ corrections
    return found.unflatten(1, sizes[:2]).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :n_tokens], last.view(sizes)


def pass_state(own: Tensor, seen: Tensor, kept: Tensor, ends: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Passes M states over N chunks: `U[n] = own[n] - seen[n] S[n]`, then `S[n+1] = ends[n] S[n] + kept[n]' U[n]`.

    Args:
        own: corrections of each chunk if its state were zero, (N, M, C, V).
        seen: by how much a chunk's state changes its corrections, (N, M, C, K).
        kept: keys, decayed from their token to the end of the chunk, (N, M, C, K).
        ends: decay of the state over a chunk, (N, M).
        state: S before the first chunk, (M, K, V).

    Returns:
        S before each chunk, (N, M, K, V); the corrections U, (N, M, C, V); and S after the last chunk, (M, K, V).
    """
    before, corrections = [], []
    for some, by_state, keys, end in zip(own, seen, kept, ends, strict=True):
        before.append(state)
        corrections.append(some - by_state @ state)
        state = end[:, None, None] * state + keys.transpose(-1, -2) @ corrections[-1]
    return torch.stack(before), torch.stack(corrections), state


def _solve(lower: Tensor, values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Solves `(1 + L) x = y` for two right-hand sides at once, where L is the part of `lower` below the diagonal."""
    both = torch.linalg.solve_triangular(lower, torch.cat([values, keys], dim=-1), upper=False, unitriangular=True)
    own, seen = both.split([values.shape[-1], keys.shape[-1]], dim=-1)
    return own, seen


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """Splits (B, T, H, E) into chunks, (N, B H, chunk, E), with zeros after the last token."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2)
