"""`naive.convolved_heads` in Triton, with inputs of 16 or 32 bits and sums in 32; each pass touches a number once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch

_MOST_CHANNELS, _MOST_TAPS = 256, 8  # of a head, and of a channel: a program holds them at once
_BLOCK = 32  # tokens of a program


def usable(x: Tensor, taps: Tensor, before: Tensor, n_heads: int) -> bool:
    """True if the kernels support types, device and sizes of the inputs."""
    fits = x.shape[-1] // (3 * n_heads) <= _MOST_CHANNELS and taps.shape[1] <= _MOST_TAPS
    return fits and all(map(dispatch.known_floats, (x, taps, before))) and dispatch.usable(x)


def convolved_heads(x: Tensor, taps: Tensor, before: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `heads.convolved_heads`; the gradients have no gradients."""
    return _convolved_heads(x, taps, before, n_heads)


@torch.library.custom_op(
    "cramlab::convolved_heads",
    mutates_args=(),
    schema="(Tensor x, Tensor taps, Tensor before, int n_heads) -> (Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _convolved_heads(x: Tensor, taps: Tensor, before: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    found = _empty_heads(x, taps, before, n_heads)
    if x.numel():
        x, taps, before = (t.contiguous() for t in (x, taps, before))
        grid, sizes, fixed = _launch(x, taps, n_heads, x.shape[1])
        dispatch.kernels("conv").forward[grid](x, taps, before, *found, *sizes, **fixed)
    return found


@_convolved_heads.register_fake
def _empty_heads(x: Tensor, taps: Tensor, before: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    del taps, before
    shape = (*x.shape[:2], n_heads, x.shape[2] // (3 * n_heads))
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op(
    "cramlab::convolved_heads_backward",
    mutates_args=(),
    schema="(Tensor to_q, Tensor to_k, Tensor to_v, Tensor x, Tensor taps, Tensor before) -> (Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _convolved_heads_backward(
    to_q: Tensor, to_k: Tensor, to_v: Tensor, x: Tensor, taps: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, taps and before."""
    to_x, to_taps, to_before = _empty_gradients(to_q, to_k, to_v, x, taps, before)
    if not x.numel():
        return to_x, to_taps.zero_(), to_before.zero_()
    given = [t.contiguous() for t in (to_q, to_k, to_v, x, taps, before)]
    n_tokens, width = x.shape[1:]
    n_heads, n_taps = to_q.shape[2], taps.shape[1]
    kernels, to_z = dispatch.kernels("conv"), torch.empty_like(given[3])
    grid, sizes, fixed = _launch(x, taps, n_heads, n_tokens)
    sums = x.new_empty(grid[0], n_taps, width, dtype=torch.float32)
    kernels.to_convolved[grid](*given, to_z, sums, *sizes, **fixed)
    grid, sizes, fixed = _launch(x, taps, n_heads, n_tokens + n_taps - 1)
    kernels.to_inputs[grid](to_z, given[4], to_x, to_before, *sizes[:2], **fixed)
    return to_x, to_taps.copy_(sums.sum(dim=0).T), to_before


@_convolved_heads_backward.register_fake
def _empty_gradients(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, taps, before = (t.new_empty(t.shape) for t in given[3:])
    return x, taps, before


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx: Any, *to_heads: Tensor) -> tuple[Tensor | None, ...]:
    return *_convolved_heads_backward(*to_heads, *ctx.saved_tensors), None


_convolved_heads.register_autograd(_gradients, setup_context=_keep)


def _launch(
    x: Tensor, taps: Tensor, n_heads: int, n_places: int
) -> tuple[tuple[int, int], tuple[int, int, float], dict[str, int]]:
    """Grid, sizes and constants of a kernel with a program for each head of some places of a sequence."""
    channels = x.shape[2] // (3 * n_heads)
    fixed = {"channels": channels, "n_taps": taps.shape[1], "block": _BLOCK,
             "block_e": 1 << (channels - 1).bit_length()}  # fmt: skip
    return (len(x) * -(-n_places // _BLOCK), 3 * n_heads), (x.shape[1], n_heads, 1 / math.sqrt(channels)), fixed
