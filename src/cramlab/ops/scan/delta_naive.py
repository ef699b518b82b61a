"""The reference implementation of the two operators inside the delta rule, in PyTorch. It runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(lower: Tensor, values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Solves `(1 + L) x = y` for two right-hand sides at once.

    Args:
        lower: L, (N, M, C, C), of which only the part below the diagonal is read.
        values: (N, M, C, V).
        keys: (N, M, C, K).

    Returns:
        Both solutions, (N, M, C, V) and (N, M, C, K).
    """
    both = torch.linalg.solve_triangular(lower, torch.cat([values, keys], dim=-1), upper=False, unitriangular=True)
    own, seen = both.split([values.shape[-1], keys.shape[-1]], dim=-1)
    return own, seen


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
