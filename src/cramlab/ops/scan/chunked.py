"""The recurrence in chunks of tokens, in PyTorch.

Chunks are solved side by side, each from a state of zero. The last states of the chunks form a sequence that is `chunk`
times shorter and obeys the same recurrence, so it is solved in the same way. Its states, decayed, are then added to
the chunks. Nothing is ever divided by a decay; work and memory are O(T G E). Reference implementation: `naive`. Source:
ours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LONGEST_GAP = 1e30  # longer gaps are cut to this: an infinite gap times a zero gradient would be NaN


def decay_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, chunk: int) -> Tensor:
    """States at every token, (B, T, G, E).

    Args:
        u: inputs, (B, T, G, E), at least one token, in the type of the other arguments.
        gaps: (B, T), >= 0.
        rates: (G,), > 0.
        state: state before the first token, (B, G, E).
        chunk: number of tokens in a chunk, at least 2.
    """
    return cast("Tensor", _DecayScan.apply(u, gaps, rates, state, max(2, chunk)))


class _DecayScan(torch.autograd.Function):
    """The scan. Its gradient is the same scan from the last token to the first."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, chunk: int) -> Tensor:
        gaps = gaps.clamp(max=LONGEST_GAP)
        s = _solve(u.flatten(2), gaps, rates, state.flatten(1), chunk).view_as(u)
        ctx.save_for_backward(gaps, rates, state, s)
        ctx.chunk = chunk
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        gaps, rates, state, s = ctx.saved_tensors
        # The gradient of a token's state is its own, plus the decayed gradient of the next token's state.
        back = torch.cat([gaps.new_zeros(len(gaps), 1), gaps[:, 1:].flip(1)], dim=1)
        nothing = torch.zeros_like(state).flatten(1)
        to_s = _solve(grad.flip(1).flatten(2), back, rates, nothing, ctx.chunk).view_as(s).flip(1)
        decay = torch.exp(-rates * gaps[..., None])  # (B, T, G)
        to_state = decay[:, 0, :, None] * to_s[:, 0]
        to_exponent = (to_s * torch.cat([state[:, None], s[:, :-1]], dim=1)).sum(dim=-1) * decay  # of -rate * gap
        to_gaps = -(to_exponent * rates).sum(dim=-1) if ctx.needs_input_grad[1] else None
        return to_s, to_gaps, -(to_exponent * gaps[..., None]).sum(dim=(0, 1)), to_state, None


def _solve(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, chunk: int) -> Tensor:
    """States at every token, (B, T, G E), from u (B, T, G E), gaps (B, T), rates (G,) and state (B, G E)."""
    n_batch, n_tokens, width = u.shape
    if n_tokens <= chunk:
        return _by_steps(u, gaps, rates, state)
    padding = -n_tokens % chunk
    if padding:  # a padded token has gap 0 and input 0, which leave the state unchanged
        u, gaps = F.pad(u, (0, 0, 0, padding)), F.pad(gaps, (0, padding))
    u, gaps = u.unflatten(1, (-1, chunk)), gaps.unflatten(1, (-1, chunk))  # (B, n, C, G E), (B, n, C)
    s = _by_steps(u, gaps, rates, None)
    since = gaps.cumsum(dim=-1)  # time since the chunk began; summed per chunk, so small gaps survive a huge one
    ends = _solve(s[:, :, -1], since[..., -1].clamp(max=LONGEST_GAP), rates, state, chunk)
    before = torch.cat([state[:, None], ends[:, :-1]], dim=1)
    s.addcmul_(_decays(since, rates, width), before[:, :, None])
    return s.view(n_batch, -1, width)[:, :n_tokens]


def _by_steps(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor | None) -> Tensor:
    """States token by token, for u (..., C, G E) and gaps (..., C); a `state` of None stands for zero."""
    s, decay = torch.empty_like(u), _decays(gaps, rates, u.shape[-1])
    for added, decayed, out in zip(u.unbind(-2), decay.unbind(-2), s.unbind(-2), strict=True):
        if state is None:
            state = out.copy_(added)
        elif torch.compiler.is_compiling():  # it does not support an `out` that is not contiguous
            state = out.copy_(torch.addcmul(added, decayed, state))
        else:
            state = torch.addcmul(added, decayed, state, out=out)
    return s


def _decays(gaps: Tensor, rates: Tensor, width: int) -> Tensor:
    """`exp(-rate * gap)`, each rate repeated for its channels, (..., width) for gaps (...)."""
    decays = torch.exp(-rates * gaps[..., None])[..., None]
    return decays.expand(*decays.shape[:-1], width // len(rates)).flatten(-2)
