"""Routed reads on an accelerator: each reader attends to its prefix of the buffer in one kernel, in Triton.

The keys are split between programs and their answers joined by log-sum-exp, since readers are few and prefixes long.
The backward pass recomputes weights from the log-sum-exp, so that no array is as large as readers times places.
The slow twin is `EpisodicMemory._attend_in_blocks`. Source: ours; the idea of splitting is that of Flash-Decoding.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = TypeVar("Function", bound=Callable[..., Any])
_FEW, _MANY = 16, 64  # readers of a program: the least that a matrix unit takes, unless there are many
_PROGRAMS = 2112  # wanted: sixteen for each of the 132 multiprocessors of an H100, as prefixes are of all lengths
_LEAST_SPLIT = 256  # places that are worth a program of their own
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_enabled = os.environ.get("CRAMLAB_FUSED_READ", "1") != "0"  # for a device on which the kernel turns out to be wrong


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Within it, whether the kernel is used where it could be."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def usable(q: Tensor, n_heads: int) -> bool:
    """Whether the kernel takes queries (..., D) like these: on CUDA, in a type and head width that it knows."""
    width = q.shape[-1] // n_heads
    known = width in (16, 32, 64, 128) and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return _enabled and q.is_cuda and known and _HAS_TRITON


def _kernels() -> Any:
    """Imported where they are launched and nowhere else: Triton may be missing."""
    return importlib.import_module("cramlab.memory.fused_read_kernels")


def _outside_graphs(function: Function) -> Function:
    """PyTorch's compiler would compile the kernels again, and fails. Not without CUDA: the import takes a second."""
    return cast("Function", torch.compiler.disable(function)) if torch.version.cuda else function


@_outside_graphs
def attend(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Multi-head attention of R readers of each sequence, each over what it sees.

    Args:
        q: (B, R, D).
        last: newest place that each reader sees, never falling along a sequence but for absent readers, (B, R); -1:
            there is no such reader, and its answer is zero.
        keys: (B, S, D).
        values: (B, S, D).
        filled: bool (B, S); None: all places up to `last` are.
        n_heads: heads that D is divided into.
        capacity: a reader sees the newest so many filled places up to its last one; None: all of them.

    Returns:
        (B, R, D).
    """
    if capacity is not None and capacity >= keys.shape[1]:
        capacity = None
    keys, values = (t.to(q.dtype).contiguous() for t in (keys, values))
    return _Attend.apply(q.contiguous(), last, keys, values, filled, n_heads, capacity)


class _Attend(torch.autograd.Function):
    """`attend`; saves inputs, answers and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int,
        capacity: int | None,
    ) -> Tensor:  # fmt: skip
        """See `attend`."""
        kernels = _kernels()
        n_batch, n_readers, d = q.shape
        n_places, width = keys.shape[1], d // n_heads
        block_r = _FEW if n_readers * n_batch * n_heads < _MANY * _PROGRAMS // 4 else _MANY
        n_blocks = -(-n_readers // block_r)
        busy = max(1, n_blocks * n_batch * n_heads)
        n_splits = max(1, min(-(-_PROGRAMS // busy), n_places // _LEAST_SPLIT, 64))
        last = last.to(torch.int32).contiguous()
        filled, n_filled = _counted(filled, capacity)
        y = torch.empty_like(q)
        lse = torch.empty(n_batch, n_heads, n_readers, dtype=torch.float32, device=q.device)
        shape = {
            "n_heads": n_heads, "n_readers": n_readers, "n_places": n_places, "capacity": capacity or 0,
            "scale": width**-0.5,
        }  # fmt: skip
        fixed = {
            "masked": filled is not None, "bounded": capacity is not None, "width": width, "block_r": block_r,
            "block_s": 64 if width < 128 or q.dtype != torch.float32 else 32,
        }  # fmt: skip
        masks = (q if filled is None else filled, q if n_filled is None else n_filled)  # a pointer must be given
        ctx.n_splits, ctx.shape, ctx.fixed = n_splits, shape, fixed
        if q.numel():
            grid = (n_blocks, n_batch * n_heads, n_splits)
            if n_splits == 1:
                kernels.forward[grid](q, keys, values, last, *masks, y, lse, n_splits=1, **shape, **fixed)
            else:
                part = q.new_empty(n_splits, n_batch, n_readers, d, dtype=torch.float32)
                part_lse = lse.new_empty(n_splits, *lse.shape)
                kernels.forward[grid](
                    q, keys, values, last, *masks, part, part_lse, n_splits=n_splits, **shape, **fixed
                )
                kernels.join[grid[:2]](
                    part, part_lse, y, lse, n_splits, n_batch, n_heads, n_readers, width=width, block_r=block_r
                )
        ctx.save_for_backward(q, last, keys, values, *masks, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, keys and values."""
        kernels = _kernels()
        q, last, keys, values, filled, n_filled, y, lse = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        n_batch, n_readers, _ = q.shape
        n_heads, n_splits = ctx.shape["n_heads"], ctx.n_splits
        # What each answer's own size takes away from the gradient of its scores, (B, H, R).
        own = (grad.float() * y.float()).unflatten(-1, (n_heads, -1)).sum(-1).transpose(1, 2).contiguous()
        to_keys, to_values = torch.empty_like(keys), torch.empty_like(values)
        part = torch.empty(n_splits, *q.shape, dtype=torch.float32 if n_splits > 1 else q.dtype, device=q.device)
        tensors = (q, keys, values, last, filled, n_filled, grad, lse, own)
        if q.numel():
            grid = (-(-n_readers // ctx.fixed["block_r"]), n_batch * n_heads, n_splits)
            kernels.to_queries[grid](*tensors, part, n_splits=n_splits, **ctx.shape, **ctx.fixed)
        if keys.numel():
            grid = (-(-keys.shape[1] // ctx.fixed["block_s"]), n_batch * n_heads)
            kernels.to_places[grid](*tensors, to_keys, to_values, **ctx.shape, **ctx.fixed)
        to_q = part[0] if n_splits == 1 else part.sum(dim=0).to(q.dtype)
        return to_q, None, to_keys, to_values, None, None, None


def _counted(filled: Tensor | None, capacity: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Masks as the kernel reads them: filled as int8, and the filled places up to each, where they must be counted."""
    if filled is None:
        return None, None
    n_filled = None if capacity is None else filled.cumsum(dim=1, dtype=torch.int32)
    return filled.contiguous().view(torch.int8), n_filled
