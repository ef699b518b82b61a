"""The first chosen tokens of each sequence: finding them, gathering their entries, scattering these back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cramlab.ops import dispatch
from cramlab.ops.select import fused, naive


def running_sum(x: Tensor) -> Tensor:
    """Cumulative sum of x (B, T) over the tokens. Counts in int64 if x is bool."""
    known = x.dtype == torch.bool or dispatch.known_floats(x)
    if len(x) == 1 or not known or x.requires_grad or not dispatch.usable(x):  # PyTorch is fast for a single row
        return x.cumsum(dim=1)
    return fused.running_sum(x)


class Chosen(NamedTuple):
    """The first R chosen tokens of each sequence, in order.

    Attributes:
        token: index of each token, int64 (B, R); the last token of the sequence where fewer than R were chosen.
        there: true where the token exists, that is, where `token` is not padding, bool (B, R).
        rank: number of chosen tokens up to and including each token, int64 (B, T).
    """

    token: Tensor
    there: Tensor
    rank: Tensor


def first_tokens(chosen: Tensor, most: int) -> Chosen:
    """The first `most` tokens of each sequence where `chosen` (B, T) is true."""
    return Chosen(*(fused if dispatch.usable(chosen) else naive).first_tokens(chosen, most))


def take(entries: Tensor, chosen: Chosen, absent: int = 0) -> Tensor:
    """Entries (B, T, ...) of the chosen tokens, (B, R, ...), and `absent` in padding."""
    token, there, rank = chosen
    if dispatch.usable(entries):
        return fused.take(entries, token, there, rank, absent)
    return naive.take(entries, token, there, absent)


def put_onto(rows: Tensor, chosen: Chosen, onto: Tensor) -> Tensor:
    """A copy of `onto` (B, T, ...) in which the rows (B, R, ...) of the chosen tokens replace theirs."""
    token, there, rank = chosen
    rows = rows.to(onto.dtype)
    if dispatch.usable(rows):
        return fused.put(rank, token, there, rows, onto)
    return naive.put_onto(rows, token, there, onto)
