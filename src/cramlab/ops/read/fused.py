"""Attention of readers, each to its prefix of the buffer, in one Triton kernel.

The keys are split between programs whose results are joined by log-sum-exp, since readers are few and prefixes long.
The backward pass recomputes the weights from the log-sum-exp, so no array is as large as readers times slots. Reference
implementation: `naive`. Source: ours; splitting the keys is the idea of Flash-Decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch

_FEW, _MANY = 16, 64  # readers per program: the least that a matrix unit takes, or more if there are many readers
_MANY_ROWS = 4096  # readers times heads from which loading keys for few readers costs more than few programs do
_AT_ONCE = 33792  # readers in all programs: sixteen of the small blocks on each of the 132 multiprocessors of an H100
_LEAST_SPLIT = 512  # slots per split, at least


def usable(q: Tensor, n_heads: int) -> bool:
    """True if the kernels support the device, the type and the head width of queries (..., D)."""
    return q.shape[-1] // n_heads in (16, 32, 64, 128) and dispatch.known_floats(q) and dispatch.usable(q)


def attend(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Attention of readers; arguments and result as in `attention.attend`. Rows without a reader are zero."""
    return _attend(*_prepared(q, last, keys, values, filled, n_heads, capacity))[0]


def use(
    q: Tensor, last: Tensor, own: Tensor, keys: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> Tensor:
    """Squared attention weights; arguments and result as in `attention.use`."""
    q, last, keys, _, *rest = _prepared(q.detach(), last, keys.detach(), keys.detach(), filled, n_heads, capacity)
    lse = _attend(q, last, keys, keys, *rest)[1]
    return _use(q, last, own.contiguous(), keys, lse, *rest)


def _prepared(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> tuple[Any, ...]:
    """The arguments as the kernels expect them."""
    if capacity is not None and capacity >= keys.shape[1]:
        capacity = None
    keys, values = (t.to(q.dtype).contiguous() for t in (keys, values))
    filled = None if filled is None else filled.contiguous()
    return q.contiguous(), last.contiguous(), keys, values, filled, n_heads, capacity


class _Launch:
    """Sizes, constants and masks that the launches of one call share."""

    def __init__(self, q: Tensor, keys: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None) -> None:
        self.n_batch, self.n_readers, d = q.shape
        n_places, width = keys.shape[1], d // n_heads
        rows = self.n_batch * n_heads
        block_r = _FEW if self.n_readers * rows < _MANY_ROWS else _MANY
        self.n_blocks, self.rows = -(-self.n_readers // block_r), rows
        busy = max(1, self.n_blocks * rows)
        self.n_splits = max(1, min(-(-_AT_ONCE // (block_r * busy)), n_places // _LEAST_SPLIT, 64))
        self.shape = {
            "n_heads": n_heads, "n_readers": self.n_readers, "n_places": n_places, "capacity": capacity or 0,
            "scale": width**-0.5,
        }  # fmt: skip
        self.fixed = {
            "masked": filled is not None, "bounded": capacity is not None, "width": width, "block_r": block_r,
            "block_s": 64 if width < 128 or q.dtype != torch.float32 else 32,
        }  # fmt: skip
        filled, n_filled = _counted(filled, capacity)
        self.masks = (
            q if filled is None else filled,
            q if n_filled is None else n_filled,
        )  # the kernels need some pointer
        self.place_grid = (-(-n_places // self.fixed["block_s"]), rows)


_ATTEND = "Tensor q, Tensor last, Tensor keys, Tensor values, Tensor? filled, SymInt n_heads, SymInt? capacity"


@torch.library.custom_op("cramlab::attend", mutates_args=(), schema=f"({_ATTEND}) -> (Tensor, Tensor)")
@dispatch.launching
def _attend(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, filled: Tensor | None, n_heads: int, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, R, D) and log-sum-exp (B, H, R)."""
    y, lse = _empty_answers(q, last, keys, values, filled, n_heads, capacity)
    if not q.numel():
        return y, lse
    go, kernels = _Launch(q, keys, filled, n_heads, capacity), dispatch.kernels("read")
    grid = (go.n_blocks, go.rows, go.n_splits)
    if go.n_splits == 1:
        kernels.forward[grid](q, keys, values, last, *go.masks, y, lse, n_splits=1, **go.shape, **go.fixed)
        return y, lse
    part = q.new_empty(go.n_splits, *q.shape, dtype=torch.float32)
    part_lse = lse.new_empty(go.n_splits, *lse.shape)
    kernels.forward[grid](
        q, keys, values, last, *go.masks, part, part_lse, n_splits=go.n_splits, **go.shape, **go.fixed
    )
    kernels.join[grid[:2]](
        part, part_lse, y, lse, go.n_splits, go.n_batch, n_heads, go.n_readers,
        width=go.fixed["width"], block_r=go.fixed["block_r"],
    )  # fmt: skip
    return y, lse


@_attend.register_fake
def _empty_answers(
    q: Tensor,
    last: Tensor,  # noqa: ARG001
    keys: Tensor,  # noqa: ARG001
    values: Tensor,  # noqa: ARG001
    filled: Tensor | None,  # noqa: ARG001
    n_heads: int,
    capacity: int | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0], n_heads, q.shape[1], dtype=torch.float32)


@torch.library.custom_op(
    "cramlab::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor y, Tensor lse, {_ATTEND}) -> (Tensor, Tensor, Tensor)",
)
@dispatch.launching
def _attend_backward(
    grad: Tensor, y: Tensor, lse: Tensor, q: Tensor, last: Tensor, keys: Tensor, values: Tensor,
    filled: Tensor | None, n_heads: int, capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, keys and values."""
    go, kernels = _Launch(q, keys, filled, n_heads, capacity), dispatch.kernels("read")
    # Subtracted from the gradient of each weight by the gradient of the softmax, (B, H, R).
    own = (grad.float() * y.float()).unflatten(-1, (n_heads, -1)).sum(-1).transpose(1, 2).contiguous()
    to_keys, to_values = torch.empty_like(keys), torch.empty_like(values)
    part = q.new_empty(go.n_splits, *q.shape, dtype=torch.float32 if go.n_splits > 1 else q.dtype)
    tensors = (q, keys, values, last, *go.masks, grad, lse, own)
    if q.numel():
        grid = (go.n_blocks, go.rows, go.n_splits)
        kernels.to_queries[grid](*tensors, part, n_splits=go.n_splits, **go.shape, **go.fixed)
    if keys.numel():
        kernels.to_places[go.place_grid](*tensors, to_keys, to_values, **go.shape, **go.fixed)
    to_q = part[0] if go.n_splits == 1 else part.sum(dim=0).to(q.dtype)
    return to_q, to_keys, to_values


@_attend_backward.register_fake
def _empty_gradients(
    grad: Tensor, y: Tensor, lse: Tensor, q: Tensor, last: Tensor, keys: Tensor, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del grad, y, lse, last
    return torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, last, keys, values, filled, ctx.n_heads, ctx.capacity = inputs
    ctx.save_for_backward(*output, q, last, keys, values, filled)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    to_q, to_keys, to_values = _attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.n_heads, ctx.capacity)
    return to_q, None, to_keys, to_values, None, None, None


_attend.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op(
    "cramlab::use",
    mutates_args=(),
    schema="(Tensor q, Tensor last, Tensor own, Tensor keys, Tensor lse, Tensor? filled, SymInt n_heads, "
    "SymInt? capacity) -> Tensor",
)
@dispatch.launching
def _use(
    q: Tensor, last: Tensor, own: Tensor, keys: Tensor, lse: Tensor, filled: Tensor | None, n_heads: int,
    capacity: int | None,
) -> Tensor:  # fmt: skip
    """Squared weights, (B, S), given the log-sum-exp of the readers."""
    go = _Launch(q, keys, filled, n_heads, capacity)
    found = q.new_empty(go.n_batch, n_heads, keys.shape[1], dtype=torch.float32)
    if found.numel():
        dispatch.kernels("read").use[go.place_grid](q, keys, last, own, *go.masks, lse, found, **go.shape, **go.fixed)
    return found.mean(dim=1).to(q.dtype)


@_use.register_fake
def _empty_use(q: Tensor, last: Tensor, own: Tensor, keys: Tensor, *_: Any) -> Tensor:
    del last, own
    return q.new_empty(keys.shape[:2])


def _counted(filled: Tensor | None, capacity: int | None) -> tuple[Tensor | None, Tensor | None]:
    """The masks of the kernels: `filled` as int8 and, with a capacity, the number of filled slots up to each slot."""
    if filled is None:
        return None, None
    n_filled = None if capacity is None else filled.cumsum(dim=1, dtype=torch.int32)
    return filled.view(torch.int8), n_filled
