"""The delta rule in Triton: `delta_naive.delta_rule`, with inputs of 16 or 32 bits, and states and sums in 32.

Products take factors of 32 bits, or of bfloat16 if queries, keys and values have that type and one of the sizes
`_IN_BFLOAT16`, and so do the arrays in between. Two kernels process all chunks at once, before and after a third that
passes the states over the chunks. The gradient of a state that passes over chunks is a state that passes back over
them, in the same kernel. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch
from cramlab.ops.scan.delta_naive import FLOOR

_MOST_CHANNELS, _MOST_TOKENS = 128, 64  # channels of a head and tokens of a chunk: a program holds them at once
# Channels of keys and values, and tokens of a chunk, with products in bfloat16: Triton 3.6 computes some others wrongly
# on an H200 (16 columns, 128 columns, states that pass without pipelining); see docs/log.md.
_IN_BFLOAT16 = {(32, 32, 64), (64, 64, 64)}
_MOST_COLUMNS = 32  # columns of a state per program that passes it


def usable(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, *, chunk: int) -> bool:
    """True if the kernels support types, device and channels of the inputs, (B, T, H, ...), and the chunk's length."""
    fits = max(k.shape[-1], v.shape[-1]) <= _MOST_CHANNELS and chunk <= _MOST_TOKENS
    return fits and all(map(dispatch.known_floats, (q, k, v, beta, log_decay))) and dispatch.usable(k)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Computes `delta.delta_rule` for a state in 32 bits; the gradients have no gradients."""
    output, last, *_ = _delta_rule(q, k, v, beta, log_decay, state, chunk)
    return output, last


_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor log_decay"
_PARTS = "Tensor since, Tensor ends, Tensor inverse, Tensor seen, Tensor kept, Tensor before, Tensor corrections"


@torch.library.custom_op(
    "cramlab::delta_rule",
    mutates_args=(),
    schema=f"({_GIVEN}, Tensor state, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, ...]:
    """The outputs, the last state and `_PARTS`, of which the gradient is made."""
    found = _empty_rule(q, k, v, beta, log_decay, state, chunk)
    if state.numel():
        output, last, *parts, before, corrections = found
        (q, k, v), (beta, log_decay) = map(_rows, (q, k, v)), (beta.contiguous(), log_decay.contiguous())
        kernels, (grid, sizes, fixed) = _kernels(), _launch(k, v, chunk)
        since, ends, inverse, seen, kept = parts
        own = torch.empty_like(corrections)
        kernels.corrections[grid](
            k, v, beta, log_decay, since, ends, inverse, own, seen, kept, *sizes, *_strides(k, v),
            floor=FLOOR, **fixed,
        )  # fmt: skip
        _pass_state(own, seen, kept, ends, state.contiguous(), None, (before, corrections, last))
        kernels.outputs[grid](q, k, since, before, corrections, output, *sizes, *_strides(q, k), **fixed)
    return found


@_delta_rule.register_fake
def _empty_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, ...]:
    del beta, log_decay
    n_batch, n_tokens, n_heads, d_key = q.shape
    d_value, n_chunks = v.shape[-1], -(-n_tokens // chunk)
    of_16_bits = q.dtype == k.dtype == v.dtype == torch.bfloat16
    kind = torch.bfloat16 if of_16_bits and (d_key, d_value, chunk) in _IN_BFLOAT16 else state.dtype
    sums = (state.new_empty(n_chunks, n_batch * n_heads, *sizes) for sizes in ((chunk,), ()))
    inside = ((chunk, chunk), (chunk, d_key), (chunk, d_key), (d_key, d_value), (chunk, d_value))
    parts = (state.new_empty(n_chunks, n_batch * n_heads, *sizes, dtype=kind) for sizes in inside)
    return v.new_empty(v.shape), state.new_empty(state.shape), *sums, *parts


@torch.library.custom_op(
    "cramlab::delta_rule_backward",
    mutates_args=(),
    schema=f"(Tensor to_output, Tensor to_last, {_GIVEN}, {_PARTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _delta_rule_backward(
    to_output: Tensor, to_last: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor,
    since: Tensor, ends: Tensor, inverse: Tensor, seen: Tensor, kept: Tensor, before: Tensor, corrections: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, beta, log_decay and state."""
    found = _empty_gradients(to_output, to_last, q, k, v, beta, log_decay)
    if to_last.numel():
        (q, k, v), (beta, log_decay) = map(_rows, (q, k, v)), (beta.contiguous(), log_decay.contiguous())
        kernels, (grid, sizes, fixed) = _kernels(), _launch(k, v, corrections.shape[2])
        to_q, to_k, to_v, to_beta, to_decay, to_state = found
        to_output, of_k, of_past = to_output.contiguous(), torch.empty_like(kept), torch.empty_like(since)
        to_before, after, to_corrections, to_own = (torch.empty_like(x) for x in (before, before, *(corrections,) * 2))
        kernels.outputs_back[grid](
            to_output, q, k, since, before, corrections, to_q, of_k, of_past, to_before, to_corrections,
            *sizes, *_strides(q, k), **fixed,
        )  # fmt: skip
        _pass_state(to_corrections, kept, seen, ends, to_last.contiguous(), to_before, (after, to_own, to_state))
        kernels.corrections_back[grid](
            to_own, after, k, v, beta, log_decay, since, ends, inverse, before, corrections, of_k, of_past,
            to_k, to_v, to_beta, to_decay, *sizes, *_strides(k, v), floor=FLOOR, **fixed,
        )  # fmt: skip
    return found


@_delta_rule_backward.register_fake
def _empty_gradients(to_output: Tensor, to_last: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    del to_output
    return tuple(x.new_empty(x.shape) for x in (*given[:5], to_last))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # no zeros for the parts
    ctx.state_shape = inputs[5].shape


def _gradients(ctx: Any, to_output: Tensor | None, to_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    v, before = saved[2], saved[-2]
    to_output = torch.zeros_like(v) if to_output is None else to_output
    to_last = before.new_zeros(ctx.state_shape, dtype=torch.float32) if to_last is None else to_last
    return *_delta_rule_backward(to_output, to_last, *saved), None


_delta_rule.register_autograd(_gradients, setup_context=_keep)


def _pass_state(
    own: Tensor, seen: Tensor, kept: Tensor, ends: Tensor, state: Tensor, added: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Computes `delta_naive.pass_state` into `found`; backwards if there is something to be added, see the kernel."""
    n_chunks, n_states, chunk, d_value = own.shape
    d_key = seen.shape[-1]
    block_v = min(_MOST_COLUMNS, _block(d_value))
    sizes = {"chunk": chunk, "d_key": d_key, "d_value": d_value}
    blocks = {"block_c": _block(chunk), "block_k": _block(d_key), "block_v": block_v}
    stages = 2 if d_key <= 64 else 1  # of loads: two of larger blocks exceed some devices' shared memory
    given = (own, seen, kept, ends, state, state if added is None else added)
    dispatch.kernels("scan", "delta_kernels").pass_state[(n_states, -(-d_value // block_v))](
        *given, *found, n_chunks, n_states, **sizes, **blocks, backward=added is not None, num_stages=stages
    )


def _launch(k: Tensor, v: Tensor, chunk: int) -> tuple[tuple[int, int], tuple[int, int], dict[str, int]]:
    """Grid, sizes and constants of a kernel whose programs process a chunk each."""
    n_batch, n_tokens, n_heads, d_key = k.shape
    d_value = v.shape[-1]
    blocks = {"block_c": _block(chunk), "block_k": _block(d_key), "block_v": _block(d_value)}
    warps = 4 if max(blocks.values()) <= 64 else 8
    fixed = {"chunk": chunk, "d_key": d_key, "d_value": d_value, **blocks, "num_warps": warps}
    return (n_batch * n_heads, -(-n_tokens // chunk)), (n_tokens, n_heads), fixed


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if the channels of a head are beside one another, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Distances of sequences, tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _block(size: int) -> int:
    """The smallest power of two that holds `size`, at least the 16 of a product on tensor cores."""
    return max(16, 1 << (size - 1).bit_length())


def _kernels() -> Any:
    return dispatch.kernels("scan", "delta_chunk_kernels")
