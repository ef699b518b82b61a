"""Which tokens of each sequence are chosen, in order: counting them, gathering them, knowing where they stood.

On an accelerator one kernel does the counting, in Triton; PyTorch's running sum takes a row in a single block, however
long it is. The slow twins stand beside it. Source: ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cramlab.memory import fused

_BLOCK = 2048  # tokens that a program counts


def running_sum(x: Tensor) -> Tensor:
    """The sum of x (B, T) up to and including each token: counts, int64, where x is bool; others to rounding."""
    known = x.dtype == torch.bool or fused.known_floats(x)
    if len(x) == 1 or not known or x.requires_grad or not fused.usable(x):  # PyTorch is fast with a single row
        return x.cumsum(dim=1)
    return _running_sum(x)


class Chosen(NamedTuple):
    """Tokens of each sequence in order, filled up to equal length.

    Attributes:
        token: their numbers, the last token where filled up, int64 (B, R).
        there: which are not filled up, bool (B, R); None: none is.
        rank: how many were chosen up to and including each token of the sequence, int64 (B, T); None: not counted.
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


def entries_at(x: Tensor, token: Tensor, there: Tensor | None, absent: int) -> Tensor:
    """The numbers x (B, T) of these tokens (B, R), `absent` where filled up; (B, R)."""
    if fused.usable(x) and x.shape[1] and not x.requires_grad:
        return _entries_at(x.contiguous(), token.contiguous(), there, absent)
    found = x.gather(1, token)
    return found if there is None else found.where(there, absent)


def flat_places(token: Tensor, there: Tensor | None, n_tokens: int) -> Tensor:
    """The tokens of `first_tokens` counted over all sequences, (B R,); one row beyond them all where filled up."""
    if len(token) > 1:
        token = token + n_tokens * torch.arange(len(token), device=token.device)[:, None]
    return (token if there is None else token.where(there, (len(token) * n_tokens))).flatten()


def rows_at(h: Tensor, token: Tensor) -> Tensor:
    """The tokens of h (B, T, D) with these numbers (B, R); (B, R, D)."""
    place = flat_places(token, None, h.shape[1])
    return h.flatten(0, 1).index_select(0, place).unflatten(0, token.shape)


@torch.library.custom_op("cramlab::running_sum", mutates_args=(), schema="(Tensor x) -> Tensor")
@fused.launching
def _running_sum(x: Tensor) -> Tensor:
    found = _empty_sum(x)
    if x.numel():
        given = (x.contiguous().view(torch.int8) if x.dtype == torch.bool else x.contiguous(), found, found, found)
        fused.kernels("selection").count[_grid(x)](*given, x.shape[1], 0, select=False, block=_BLOCK)
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
        fused.kernels("selection").count[_grid(chosen)](*given, chosen.shape[1], most, select=True, block=_BLOCK)
    return token, there, rank


@_first_tokens.register_fake
def _empty_tokens(chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    token = chosen.new_empty(len(chosen), most, dtype=torch.int64)
    return token, torch.empty_like(token, dtype=torch.bool), chosen.new_empty(chosen.shape, dtype=torch.int64)


@torch.library.custom_op(
    "cramlab::entries_at", mutates_args=(), schema="(Tensor x, Tensor token, Tensor? there, int absent) -> Tensor"
)
@fused.launching
def _entries_at(x: Tensor, token: Tensor, there: Tensor | None, absent: int) -> Tensor:
    found = _empty_entries(x, token)
    if found.numel():
        given = x, token, token if there is None else there.contiguous().view(torch.int8), found
        grid = (-(-token.shape[1] // _BLOCK), len(x))
        sizes = x.shape[1], token.shape[1]
        fused.kernels("selection").entries_at[grid](*given, *sizes, absent, all_there=there is None, block=_BLOCK)
    return found


@_entries_at.register_fake
def _empty_entries(x: Tensor, token: Tensor, *_: object) -> Tensor:
    return x.new_empty(token.shape)


def _grid(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[1] // _BLOCK), len(x)
