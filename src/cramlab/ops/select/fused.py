"""The selection kernels as PyTorch operators.

PyTorch's cumulative sum processes a row in a single block, however long it is, and its gradient of a gather adds
atomically, as it cannot know that no token is chosen twice. Reference implementation: `naive`. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch

_BLOCK = 2048  # tokens that a program counts, or numbers that it moves


@torch.library.custom_op("cramlab::running_sum", mutates_args=(), schema="(Tensor x) -> Tensor")
@dispatch.launching
def running_sum(x: Tensor) -> Tensor:
    """Cumulative sum of x (B, T) over the tokens, int64 if x is bool."""
    total = _empty_sum(x)
    if x.numel():
        given = (x.contiguous().view(torch.int8) if x.dtype == torch.bool else x.contiguous(), total, total, total)
        dispatch.kernels("select").count[_grid(x)](*given, x.shape[1], 0, select=False, block=_BLOCK, wide=4 * _BLOCK)
    return total


@running_sum.register_fake
def _empty_sum(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int64 if x.dtype == torch.bool else x.dtype)


@torch.library.custom_op(
    "cramlab::first_tokens", mutates_args=(), schema="(Tensor chosen, SymInt most) -> (Tensor, Tensor, Tensor)"
)
@dispatch.launching
def first_tokens(chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `tokens.Chosen` for the first `most` tokens where `chosen` (B, T) is true."""
    token, there, rank = _empty_tokens(chosen, most)
    if not chosen.numel():
        token.fill_(-1)
        there.fill_(False)
    else:
        given = (chosen.contiguous().view(torch.int8), rank, token, there.view(torch.int8))
        dispatch.kernels("select").count[_grid(chosen)](
            *given, chosen.shape[1], most, select=True, block=_BLOCK, wide=4 * _BLOCK
        )
    return token, there, rank


@first_tokens.register_fake
def _empty_tokens(chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    token = chosen.new_empty(len(chosen), most, dtype=torch.int64)
    return token, torch.empty_like(token, dtype=torch.bool), chosen.new_empty(chosen.shape, dtype=torch.int64)


@torch.library.custom_op(
    "cramlab::take",
    mutates_args=(),
    schema="(Tensor entries, Tensor token, Tensor there, Tensor rank, int absent) -> Tensor",
)
@dispatch.launching
def take(entries: Tensor, token: Tensor, there: Tensor, rank: Tensor, absent: int) -> Tensor:
    """Entries (B, T, ...) at the indices `token`, (B, R, ...), and `absent` where `there` is false."""
    rows = _empty_taken(entries, token, there, rank, absent)
    if rows.numel():
        given, sizes = (entries.contiguous(), token, there.view(torch.int8), rows), (entries.shape[1], token.shape[1])
        grid, fixed = _rows_grid(rows)
        dispatch.kernels("select").take[grid](*given, *sizes, absent, entries.shape[2:].numel(), **fixed)
    return rows


@take.register_fake
def _empty_taken(entries: Tensor, token: Tensor, *_: object) -> Tensor:
    return entries.new_empty(*token.shape, *entries.shape[2:])


@torch.library.custom_op(
    "cramlab::put",
    mutates_args=(),
    schema="(Tensor rank, Tensor token, Tensor there, Tensor? rows, Tensor? onto) -> Tensor",
)
@dispatch.launching
def put(rank: Tensor, token: Tensor, there: Tensor, rows: Tensor | None, onto: Tensor | None) -> Tensor:
    """A copy of `onto` (B, T, ...) with `rows` (B, R, ...) at the chosen tokens. One of both may be None: zeros."""
    y = _empty_put(rank, token, there, rows, onto)
    if y.numel():
        given = [y if t is None else t.contiguous() for t in (rows, onto)]  # a pointer must be given
        grid, fixed = _rows_grid(y)
        sizes = (*token.shape[1:], y.shape[2:].numel())
        dispatch.kernels("select").put[grid](
            rank, *given, y, rank.shape[1], *sizes, has_found=rows is not None, has_onto=onto is not None, **fixed
        )
    return y


@put.register_fake
def _empty_put(
    rank: Tensor, token: Tensor, there: Tensor, rows: Tensor | None, onto: Tensor | None
) -> Tensor:  # fmt: skip
    del token, there
    like = rows if onto is None else onto
    assert like is not None
    return like.new_empty(*rank.shape, *like.shape[2:])


def _keep_taken(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:4])


def _put_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    token, there, rank = ctx.saved_tensors
    return put(rank, token, there, grad, None), None, None, None, None


def _keep_put(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])


def _take_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rank, token, there = ctx.saved_tensors
    *_, wants_rows, wants_onto = ctx.needs_input_grad
    to_rows = take(grad, token, there, rank, 0) if wants_rows else None
    return None, None, None, to_rows, put(rank, token, there, None, grad) if wants_onto else None


take.register_autograd(_put_gradient, setup_context=_keep_taken)
put.register_autograd(_take_gradients, setup_context=_keep_put)


def _grid(x: Tensor) -> tuple[int, int]:
    """Grid of programs for numbers (B, T)."""
    return -(-x.shape[1] // _BLOCK), len(x)


def _rows_grid(rows: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid of programs for rows (B, N, ...), and constants of the kernels."""
    d = rows.shape[2:].numel()
    block_d = min(256, 1 << (d - 1).bit_length())
    block = max(1, _BLOCK // block_d)
    return (-(-rows.shape[1] // block), len(rows), -(-d // block_d)), {"block": block, "block_d": block_d}
