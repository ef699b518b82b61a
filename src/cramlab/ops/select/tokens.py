"""Which tokens of each sequence are chosen, in order: counting them, taking their entries, putting these back.

On an accelerator a kernel does each, in Triton. PyTorch's running sum takes a row in a single block, however long it
is, and its gradient of a gather adds atomically, as it cannot know that no token is chosen twice. The slow twins
stand beside the kernels. Source: ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cramlab.ops import dispatch as fused

_BLOCK = 2048  # tokens that a program counts, or numbers that it moves


def running_sum(x: Tensor) -> Tensor:
    """The sum of x (B, T) up to and including each token: counts, int64, where x is bool; others to rounding."""
    known = x.dtype == torch.bool or fused.known_floats(x)
    if len(x) == 1 or not known or x.requires_grad or not fused.usable(x):  # PyTorch is fast with a single row
        return x.cumsum(dim=1)
    return _running_sum(x)


class Chosen(NamedTuple):
    """The first R of the chosen tokens of each sequence in order, filled up to equal length.

    Attributes:
        token: their numbers, the last token where filled up, int64 (B, R).
        there: which are not filled up, bool (B, R); None: none is.
        rank: how many were chosen up to and including each token of the sequence, int64 (B, T), by which kernels know
            the tokens; None: not counted.
    """

    token: Tensor
    there: Tensor | None
    rank: Tensor | None


def first_tokens(chosen: Tensor, most: int | None) -> Chosen:
    """The chosen tokens of each sequence.

    Args:
        chosen: bool (B, T).
        most: the first so many of each sequence, R; None: all, for which the device is waited for.
    """
    if most is None and len(chosen) == 1:
        return Chosen(chosen[0].nonzero().T, None, None)
    if most is not None and fused.usable(chosen):
        return Chosen(*_first_tokens(chosen, most))
    rank, n_tokens = chosen.cumsum(dim=1), chosen.shape[1]
    if most is None:
        most = int(rank[:, -1:].amax()) if chosen.numel() else 0
    wanted = torch.arange(1, most + 1, device=chosen.device).expand(len(chosen), -1).contiguous()
    token = torch.searchsorted(rank, wanted)  # the first token of that rank; beyond them all if there is none
    return Chosen(token.clamp(max=n_tokens - 1), token < n_tokens, rank)


def take(entries: Tensor, chosen: Chosen, absent: int = 0) -> Tensor:
    """The entries (B, T, ...) of the chosen tokens, (B, R, ...); `absent` where filled up."""
    token, there, rank = chosen
    if rank is not None and there is not None and fused.usable(entries):
        return _take(entries, token, there, rank, absent)
    if entries.dim() == 2:
        found = entries.gather(1, token)
    else:
        place = _places(chosen._replace(there=None), entries.shape[1])
        found = entries.flatten(0, 1).index_select(0, place).unflatten(0, token.shape)
    return found if there is None else found.masked_fill(~there.view(there.shape + (1,) * (found.dim() - 2)), absent)


def put(found: Tensor, chosen: Chosen, n_tokens: int) -> Tensor:
    """Entries (B, R, ...) back at their tokens, (B, T, ...); zero at all others."""
    token, there, rank = chosen
    if rank is not None and there is not None and fused.usable(found):
        return _put(rank, token, there, found, None)
    y = found.new_zeros(len(found) * n_tokens + 1, *found.shape[2:])
    y.index_copy_(0, _places(chosen, n_tokens), found.flatten(0, 1))
    return y[:-1].view(len(found), n_tokens, *found.shape[2:])


def put_onto(found: Tensor, chosen: Chosen, onto: Tensor) -> Tensor:
    """As `put`; of `onto` (B, T, ...) at all other tokens, in its type."""
    token, there, rank = chosen
    found = found.to(onto.dtype)
    if rank is not None and there is not None and fused.usable(found):
        return _put(rank, token, there, found, onto)
    y = torch.cat([onto.flatten(0, 1), onto.new_zeros(1, *onto.shape[2:])])
    y.index_copy_(0, _places(chosen, onto.shape[1]), found.flatten(0, 1))
    return y[:-1].view_as(onto)


def _places(chosen: Chosen, n_tokens: int) -> Tensor:
    """The tokens counted over all sequences, (B R,); one beyond them all where filled up."""
    place, there, _ = chosen
    if len(place) > 1:
        place = place + n_tokens * torch.arange(len(place), device=place.device)[:, None]
    return (place if there is None else place.where(there, len(place) * n_tokens)).flatten()


@torch.library.custom_op("cramlab::running_sum", mutates_args=(), schema="(Tensor x) -> Tensor")
@fused.launching
def _running_sum(x: Tensor) -> Tensor:
    found = _empty_sum(x)
    if x.numel():
        given = (x.contiguous().view(torch.int8) if x.dtype == torch.bool else x.contiguous(), found, found, found)
        fused.kernels("selection").count[_grid(x)](*given, x.shape[1], 0, select=False, block=_BLOCK, wide=4 * _BLOCK)
    return found


@_running_sum.register_fake
def _empty_sum(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int64 if x.dtype == torch.bool else x.dtype)


@torch.library.custom_op(
    "cramlab::first_tokens", mutates_args=(), schema="(Tensor chosen, SymInt most) -> (Tensor, Tensor, Tensor)"
)
@fused.launching
def _first_tokens(chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    token, there, rank = _empty_tokens(chosen, most)
    if not chosen.numel():
        token.fill_(-1)
        there.fill_(False)
    else:
        given = (chosen.contiguous().view(torch.int8), rank, token, there.view(torch.int8))
        fused.kernels("selection").count[_grid(chosen)](
            *given, chosen.shape[1], most, select=True, block=_BLOCK, wide=4 * _BLOCK
        )
    return token, there, rank


@_first_tokens.register_fake
def _empty_tokens(chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    token = chosen.new_empty(len(chosen), most, dtype=torch.int64)
    return token, torch.empty_like(token, dtype=torch.bool), chosen.new_empty(chosen.shape, dtype=torch.int64)


@torch.library.custom_op(
    "cramlab::take",
    mutates_args=(),
    schema="(Tensor entries, Tensor token, Tensor there, Tensor rank, int absent) -> Tensor",
)
@fused.launching
def _take(entries: Tensor, token: Tensor, there: Tensor, rank: Tensor, absent: int) -> Tensor:
    found = _empty_taken(entries, token, there, rank, absent)
    if found.numel():
        given, sizes = (entries.contiguous(), token, there.view(torch.int8), found), (entries.shape[1], token.shape[1])
        grid, fixed = _rows_grid(found)
        fused.kernels("selection").take[grid](*given, *sizes, absent, entries.shape[2:].numel(), **fixed)
    return found


@_take.register_fake
def _empty_taken(entries: Tensor, token: Tensor, *_: object) -> Tensor:
    return entries.new_empty(*token.shape, *entries.shape[2:])


@torch.library.custom_op(
    "cramlab::put",
    mutates_args=(),
    schema="(Tensor rank, Tensor token, Tensor there, Tensor? found, Tensor? onto) -> Tensor",
)
@fused.launching
def _put(rank: Tensor, token: Tensor, there: Tensor, found: Tensor | None, onto: Tensor | None) -> Tensor:
    """One of both is given at least; what is missing is zero."""
    y = _empty_put(rank, token, there, found, onto)
    if y.numel():
        given = [y if t is None else t.contiguous() for t in (found, onto)]  # a pointer must be given
        grid, fixed = _rows_grid(y)
        sizes = (*token.shape[1:], y.shape[2:].numel())
        fused.kernels("selection").put[grid](
            rank, *given, y, rank.shape[1], *sizes, has_found=found is not None, has_onto=onto is not None, **fixed
        )
    return y


@_put.register_fake
def _empty_put(
    rank: Tensor, token: Tensor, there: Tensor, found: Tensor | None, onto: Tensor | None
) -> Tensor:  # fmt: skip
    del token, there
    like = found if onto is None else onto
    assert like is not None
    return like.new_empty(*rank.shape, *like.shape[2:])


def _keep_taken(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:4])


def _put_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    token, there, rank = ctx.saved_tensors
    return _put(rank, token, there, grad, None), None, None, None, None


def _keep_put(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])


def _take_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rank, token, there = ctx.saved_tensors
    *_, wants_found, wants_onto = ctx.needs_input_grad
    to_found = _take(grad, token, there, rank, 0) if wants_found else None
    return None, None, None, to_found, _put(rank, token, there, None, grad) if wants_onto else None


_take.register_autograd(_put_gradient, setup_context=_keep_taken)
_put.register_autograd(_take_gradients, setup_context=_keep_put)


def _grid(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[1] // _BLOCK), len(x)


def _rows_grid(rows: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid of programs for rows (B, N, ...), and the constants of the kernels."""
    d = rows.shape[2:].numel()
    block_d = min(256, 1 << (d - 1).bit_length())
    block = max(1, _BLOCK // block_d)
    return (-(-rows.shape[1] // block), len(rows), -(-d // block_d)), {"block": block, "block_d": block_d}
