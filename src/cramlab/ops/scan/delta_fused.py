"""The two operators inside the delta rule in Triton; arguments and results as in `delta_naive`, in 32 bits.

The gradient of a state that passes over chunks is a state that passes back over them, in the same kernel; all other
gradients are batched products. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch

_MOST_KEYS, _MOST_TOKENS = 128, 64  # channels of a key and tokens of a chunk, at most: a program holds them at once
_MOST_COLUMNS = 32  # columns of a state per program, at most


def usable(k: Tensor, chunk: int) -> bool:
    """True if the kernels support the type, device and channels of the keys k (..., K) and the length of a chunk."""
    fits = k.shape[-1] <= _MOST_KEYS and chunk <= _MOST_TOKENS
    return fits and k.dtype == torch.float32 and dispatch.usable(k)


def solve(lower: Tensor, values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Implements `delta_naive.solve` by the inverse of `1 + L`."""
    inverse = _invert(lower.contiguous())
    return inverse @ values, inverse @ keys


def pass_state(own: Tensor, seen: Tensor, kept: Tensor, ends: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `delta_naive.pass_state`."""
    return _pass_state(*(t.contiguous() for t in (own, seen, kept, ends, state)))


@torch.library.custom_op("cramlab::invert_lower", mutates_args=(), schema="(Tensor lower) -> Tensor")
@dispatch.launching
def _invert(lower: Tensor) -> Tensor:
    """The inverse of `1 + L`, where L is the part of `lower` (..., C, C) below the diagonal."""
    found, chunk = torch.empty_like(lower), lower.shape[-1]
    if found.numel():
        block = _block(chunk)
        fixed = {"chunk": chunk, "block": block, "levels": block.bit_length() - 1}
        _kernels().invert[(lower.shape[:-2].numel(),)](lower, found, **fixed)
    return found


@_invert.register_fake
def _empty_inverse(lower: Tensor) -> Tensor:
    return torch.empty_like(lower)


def _keep_inverse(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(output)


def _gradient_of_lower(ctx: Any, grad: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):
        across = inverse.transpose(-1, -2)
        return -(across @ grad @ across).tril(-1)


_invert.register_autograd(_gradient_of_lower, setup_context=_keep_inverse)


def _passed(
    own: Tensor, seen: Tensor, kept: Tensor, ends: Tensor, state: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel; backwards if there is something to be added, see `delta_kernels.pass_state`."""
    n_chunks, n_states, chunk, d_value = own.shape
    d_key = seen.shape[-1]
    before, corrections, last = _empty_states(own, seen, kept, ends, state)
    if state.numel():
        block_v = min(_MOST_COLUMNS, _block(d_value))
        sizes = {"chunk": chunk, "d_key": d_key, "d_value": d_value}
        blocks = {"block_c": _block(chunk), "block_k": _block(d_key), "block_v": block_v}
        stages = 2 if d_key <= 64 else 1  # of loads: two of larger blocks exceed some devices' shared memory
        given, found = (own, seen, kept, ends, state, state if added is None else added), (before, corrections, last)
        _kernels().pass_state[(n_states, -(-d_value // block_v))](
            *given, *found, n_chunks, n_states, **sizes, **blocks, backward=added is not None, num_stages=stages
        )
    return before, corrections, last


@torch.library.custom_op(
    "cramlab::pass_state",
    mutates_args=(),
    schema="(Tensor own, Tensor seen, Tensor kept, Tensor ends, Tensor state) -> (Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _pass_state(own: Tensor, seen: Tensor, kept: Tensor, ends: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _passed(own, seen, kept, ends, state, None)


@_pass_state.register_fake
def _empty_states(own: Tensor, seen: Tensor, kept: Tensor, ends: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    del seen, kept, ends
    return own.new_empty(len(own), *state.shape), torch.empty_like(own), torch.empty_like(state)


@torch.library.custom_op(
    "cramlab::pass_state_backward",
    mutates_args=(),
    schema="(Tensor to_before, Tensor to_corrections, Tensor to_last, Tensor seen, Tensor kept, Tensor ends)"
    " -> (Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _pass_back(
    to_before: Tensor, to_corrections: Tensor, to_last: Tensor, seen: Tensor, kept: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the state after each chunk, of its corrections, and of the state before the first chunk."""
    return _passed(to_corrections, kept, seen, ends, to_last, to_before)


@_pass_back.register_fake
def _empty_gradients(
    to_before: Tensor, to_corrections: Tensor, to_last: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(to_before), torch.empty_like(to_corrections), torch.empty_like(to_last)


def _keep_states(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:4], *output[:2])


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    seen, kept, ends, before, corrections = ctx.saved_tensors
    after, to_own, to_state = _pass_back(*(grad.contiguous() for grad in grads), seen, kept, ends)
    with torch.autocast(seen.device.type, enabled=False):
        to_seen = -to_own @ before.transpose(-1, -2)
        to_kept = corrections @ after.transpose(-1, -2)
        to_ends = (after * before).sum(dim=(-1, -2))
    return to_own, to_seen, to_kept, to_ends, to_state


_pass_state.register_autograd(_gradients, setup_context=_keep_states)


def _block(size: int) -> int:
    """The smallest power of two that holds `size`, at least the 16 of a product on tensor cores."""
    return max(16, 1 << (size - 1).bit_length())


def _kernels() -> Any:
    return dispatch.kernels("scan", "delta_kernels")
