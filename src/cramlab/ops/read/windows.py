"""Attention of few readers of one sequence over long windows of slots, a tile of slots at a time, on a CPU.

A tile is scored only for the readers that see some of it, so hardly more is scored than is seen. It is loaded once for
all of them, forward and backward, and no array is as large as readers times slots. Reference implementation:
`naive.attend`. Source: ours.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.amp.autocast_mode import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from cramlab.ops.read.attention import dense

_READERS = 384  # readers per tile, at most, so that a tile's scores stay in the cache
_SLOTS = 1024  # slots per tile, at most
_WORTH_A_TILE = 16384  # pairs of reader and slot whose scores take as long as the calls for another tile


class Tile(NamedTuple):
    """Readers [i, j) against slots [a, b); readers before `whole` do not see its end, those from `late` its start."""

    i: int
    j: int
    a: int
    b: int
    whole: int
    late: int

    @property
    def n_pairs(self) -> int:
        """Number of scores computed."""
        return (self.j - self.i) * (self.b - self.a)


def tiles(first: list[int], last: list[int]) -> Iterator[Tile]:
    """Tiles that cover every pair of a reader and a slot that it sees, and few other pairs.

    Args:
        first: oldest slot that each reader sees, not falling.
        last: newest slot that each reader sees, not falling.
    """
    n_readers = len(last)
    size = math.ceil(n_readers / math.ceil(n_readers / _READERS)) if n_readers else 1
    for start in range(0, n_readers, size):
        end = min(start + size, n_readers)
        begin, stop = first[start], last[end - 1] + 1
        # n tiles score about 1/n of all pairs unnecessarily; at this n that costs as much as the calls.
        n_tiles = round(math.sqrt((end - start) * (stop - begin) / 2 / _WORTH_A_TILE))
        width = min(_SLOTS, math.ceil((stop - begin) / max(1, n_tiles)))
        for a in range(begin, stop, width):
            b = min(a + width, stop)
            i, j = bisect_left(last, a, start, end), bisect_left(first, b, start, end)
            if i < j:
                yield Tile(i, j, a, b, bisect_left(last, b - 1, i, j), bisect_right(first, a, i, j))


def window_attention(q: Tensor, k: Tensor, v: Tensor, first: list[int], last: list[int], n_heads: int) -> Tensor:
    """Each reader attends to the slots from its `first` to its `last`, (R, D).

    Args:
        q: (R, D).
        k: (S, D).
        v: (S, D).
        first: oldest slot that each reader sees, not falling.
        last: newest slot that each reader sees, not falling, not before `first`.
        n_heads: number of heads that share D.
    """
    needed = list(tiles(first, last))
    if len(needed) == 1:  # little to compute: the calls dominate, and PyTorch's kernel is one
        return _one_tile(q, k, v, needed[0], (first, last), n_heads)
    exact = torch.promote_types(q.dtype, torch.float32)  # sums over tiles need more than 16 bits
    found = _WindowAttention.apply(q.to(exact), k.to(exact), v.to(exact), first, last, n_heads)
    return cast("Tensor", found).to(q.dtype)


def _one_tile(q: Tensor, k: Tensor, v: Tensor, tile: Tile, bounds: tuple[list[int], list[int]], n_heads: int) -> Tensor:
    """Attention of all readers, which see one tile."""
    seen = None
    if tile.whole > tile.i or tile.late < tile.j:
        places = torch.arange(tile.a, tile.b)
        first, last = (torch.tensor(bound)[:, None] for bound in bounds)
        seen = (places >= first) & (places <= last)
    return dense(q[None], k[None, tile.a : tile.b], v[None, tile.a : tile.b], n_heads, seen)[0]


def score(q: Tensor, k: Tensor) -> Tensor:
    """Scores of one of several tiles, (H, R, S), from q (H, R, E) and k (H, S, E)."""
    return torch.bmm(q, k.transpose(1, 2))


class _WindowAttention(torch.autograd.Function):
    """Softmax summed tile by tile, in base 2, which is three times as fast as base e."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: list[int], last: list[int], n_heads: int) -> Tensor:
        width = q.shape[-1] // n_heads
        scale = 1 / math.log(2) / math.sqrt(width)
        queries, keys, values = (_by_head(t, n_heads) for t in (q * scale, k, v))
        bounds = torch.tensor(first)[:, None], torch.tensor(last)[:, None]
        top = q.new_full((n_heads, len(q), 1), -torch.inf)
        total, found = torch.zeros_like(top), q.new_zeros(n_heads, len(q), width)
        for tile in tiles(first, last):
            readers, places = slice(tile.i, tile.j), slice(tile.a, tile.b)
            scores = _masked(score(queries[:, readers], keys[:, places]), tile, bounds)
            before = top[:, readers]
            now = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
            weights = scores.sub_(now).exp2_()
            fade = before.sub_(now).exp2_()
            total[:, readers].mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
            found[:, readers].mul_(fade).add_(torch.bmm(weights, values[:, places]))
            top[:, readers] = now
        found /= total
        ctx.save_for_backward(q, k, v, found, top + total.log2())
        ctx.first, ctx.last = first, last
        return found.transpose(0, 1).flatten(1)

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, found, size = ctx.saved_tensors
        n_heads, _, width = found.shape
        scale = 1 / math.log(2) / math.sqrt(width)
        queries, keys, values, grad = (_by_head(t, n_heads) for t in (q * scale, k, v, grads[0]))
        bounds = torch.tensor(ctx.first)[:, None], torch.tensor(ctx.last)[:, None]
        mean = (grad * found).sum(dim=-1, keepdim=True)
        of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        to_q, to_k, to_v = (_by_head(t, n_heads) for t in (of_q, of_k, of_v))
        for tile in tiles(ctx.first, ctx.last):
            readers, places = slice(tile.i, tile.j), slice(tile.a, tile.b)
            scores = _masked(score(queries[:, readers], keys[:, places]), tile, bounds)
            weights = scores.sub_(size[:, readers]).exp2_()
            to_v[:, places] += torch.bmm(weights.transpose(1, 2), grad[:, readers])
            of_scores = torch.bmm(grad[:, readers], values[:, places].transpose(1, 2))
            of_scores = of_scores.sub_(mean[:, readers]).mul_(weights)
            to_q[:, readers] += torch.bmm(of_scores, keys[:, places])
            to_k[:, places] += torch.bmm(of_scores.transpose(1, 2), queries[:, readers])
        return of_q.div_(math.sqrt(width)), of_k.mul_(math.log(2)), of_v, None, None, None


def _by_head(entries: Tensor, n_heads: int) -> Tensor:
    """A view (H, R, E) of entries (R, H E)."""
    return entries.unflatten(-1, (n_heads, -1)).transpose(0, 1)


def _masked(scores: Tensor, tile: Tile, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Sets scores (H, j - i, b - a) to minus infinity where a reader does not see the slot."""
    if tile.whole > tile.i or tile.late < tile.j:
        places = torch.arange(tile.a, tile.b)
        first, last = bounds
        unseen = places > last[tile.i : tile.whole]
        scores[:, : tile.whole - tile.i].masked_fill_(unseen, -torch.inf)
        gone = places < first[tile.late : tile.j]
        scores[:, tile.late - tile.i :].masked_fill_(gone, -torch.inf)
    return scores
