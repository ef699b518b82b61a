"""The reference implementation of the selection kernels, in plain PyTorch. It runs wherever the kernels do not."""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B, R) of the first R = `most` chosen tokens, which of them exist (B, R), and their ranks (B, T)."""
    rank, n_tokens = chosen.cumsum(dim=1), chosen.shape[1]
    wanted = torch.arange(1, most + 1, device=chosen.device).expand(len(chosen), -1).contiguous()
    token = torch.searchsorted(rank, wanted)  # the first token of that rank, or T if there is none
    return token.clamp(max=n_tokens - 1), token < n_tokens, rank


def take(entries: Tensor, token: Tensor, there: Tensor, absent: int) -> Tensor:
    """Entries (B, T, ...) at the indices `token`, (B, R, ...), and `absent` where `there` is false."""
    if entries.dim() == 2:
        taken = entries.gather(1, token)
    else:
        taken = entries.flatten(0, 1).index_select(0, _over_batch(token, entries.shape[1])).unflatten(0, token.shape)
    return taken.masked_fill(~there.view(there.shape + (1,) * (taken.dim() - 2)), absent)


def put_onto(rows: Tensor, token: Tensor, there: Tensor, onto: Tensor) -> Tensor:
    """A copy of `onto` (B, T, ...) with `rows` (B, R, ...) at the indices `token`, where `there` is true."""
    spare = len(onto) * onto.shape[1]  # one row after the last token takes the rows that do not exist
    place = _over_batch(token, onto.shape[1]).where(there.flatten(), spare)
    y = torch.cat([onto.flatten(0, 1), onto.new_zeros(1, *onto.shape[2:])])
    return y.index_copy_(0, place, rows.flatten(0, 1))[:-1].view_as(onto)


def _over_batch(token: Tensor, n_tokens: int) -> Tensor:
    """Indices (B, R) within sequences of T tokens, as indices into all B T tokens, (B R,)."""
    if len(token) > 1:
        token = token + n_tokens * torch.arange(len(token), device=token.device)[:, None]
    return token.flatten()
