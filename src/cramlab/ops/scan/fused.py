"""The recurrence `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]` in Triton.

Three kernels compute the last state of each chunk of tokens if the chunk begins at zero, then the state before each
chunk, then all states. Nothing is ever divided by a decay, and times are summed from the near end, so small gaps
survive beside huge ones. The gradient is the same scan from the last token to the first. Reference implementation:
`naive`. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch
from cramlab.ops.scan.chunked import LONGEST_GAP

_CHUNK = 64  # tokens per program
_MOST_CHANNELS = 64  # channels per program, at most


def usable(u: Tensor) -> bool:
    """True if the kernels support the type and device of u (B, T, G, E)."""
    return dispatch.known_floats(u) and dispatch.usable(u)


def decay_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """States at every token, (B, T, G, E), in 32 bits.

    Args:
        u: (B, T, G, E), at least one token.
        gaps: (B, T), in 32 bits.
        rates: (G,), in 32 bits.
        state: state before the first token, (B, G, E), in 32 bits.
    """
    return _scan(u.contiguous(), gaps.contiguous(), rates.contiguous(), state.contiguous())


def _solve(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, found: Tensor, s: Tensor | None) -> list[Tensor]:
    """Writes the states into `found`. If given the states `s` of a scan, computes that scan's gradient, backwards.

    Returns:
        Nothing for a scan; for a gradient, the gradient of the gaps by blocks of channels, (n, B, T), and that of the
        rates by chunks, (n, B, G E).
    """
    n_batch, n_tokens, n_rates, width = u.shape
    channels = n_rates * width
    block_w = min(_MOST_CHANNELS, 1 << (channels - 1).bit_length())
    n_chunks, n_blocks = -(-n_tokens // _CHUNK), -(-channels // block_w)
    grid, scan = (n_chunks, n_batch, n_blocks), dispatch.kernels("scan")
    ends, spans = state.new_empty(n_batch, n_chunks, channels), state.new_empty(n_batch, n_chunks)
    begins = state.new_empty(n_batch, n_chunks, channels)
    sizes = (n_tokens, n_chunks, channels, width)
    fixed = {"backward": s is not None, "chunk": _CHUNK, "block_w": block_w}
    scan.ends[grid](u, gaps, rates, ends, spans, *sizes, **fixed)
    before = state if s is None else torch.zeros_like(state)  # backwards, nothing comes after the last token
    scan.begins[grid[1:]](
        ends, spans, rates, before, begins, n_chunks, channels, width, block_n=_CHUNK, block_w=block_w
    )
    if s is None:
        scan.within[grid](u, gaps, rates, begins, found, *(found,) * 4, *sizes, **fixed)
        return []
    of_gaps = gaps.new_empty(n_blocks, n_batch, n_tokens)
    of_rates = rates.new_empty(n_chunks, n_batch, channels)
    scan.within[grid](u, gaps, rates, begins, found, s, state, of_gaps, of_rates, *sizes, **fixed)
    return [of_gaps, of_rates]


_GIVEN = "Tensor u, Tensor gaps, Tensor rates, Tensor state"


@torch.library.custom_op("cramlab::decay_scan", mutates_args=(), schema=f"({_GIVEN}) -> Tensor")
@dispatch.launching
def _scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    found = torch.empty_like(u, dtype=torch.float32)
    if u.numel():
        _solve(u, gaps, rates, state, found, None)
    return found


@_scan.register_fake
def _empty_states(u: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(u, dtype=torch.float32)


@torch.library.custom_op(
    "cramlab::decay_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor s, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _scan_backward(
    grad: Tensor, s: Tensor, u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, gaps, rates and state."""
    to_u = torch.empty_like(u, dtype=torch.float32)  # so that the state's gradient is not rounded
    if not u.numel():
        return to_u.to(u.dtype), torch.zeros_like(gaps), torch.zeros_like(rates), torch.zeros_like(state)
    of_gaps, of_rates = _solve(grad, gaps, rates, state, to_u, s)
    to_state = torch.exp(-rates * gaps[:, :1].clamp(max=LONGEST_GAP))[..., None] * to_u[:, 0]
    return to_u.to(u.dtype), of_gaps.sum(dim=0), of_rates.sum(dim=(0, 1)).view(len(rates), -1).sum(dim=1), to_state


@_scan_backward.register_fake
def _empty_gradients(
    grad: Tensor, s: Tensor, u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad, s
    return torch.empty_like(u), torch.empty_like(gaps), torch.empty_like(rates), torch.empty_like(state)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _scan_backward(grad.contiguous(), *ctx.saved_tensors)


_scan.register_autograd(_gradients, setup_context=_keep)
