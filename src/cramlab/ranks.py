"""Processes that train one model together, the ranks: their share of a batch, their sums, and what they agree on.

Every rank holds the whole model and some rows of each batch. A mean over a batch is a sum over the rank's rows, divided
by `count_over_ranks` of all rows over the number of ranks; the mean of such values over the ranks is the mean over
the batch, and so is the mean of their gradients. Source: ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A rank among those that train together; the process group of `torch.distributed` has as many.

    Attributes:
        index: number of this rank, from 0. Only rank 0 writes files.
        n: number of ranks; 1: this process trains alone, and nothing is sent.
    """

    index: int = 0
    n: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes the files."""
        return self.index == 0

    def rows(self, n_rows: int) -> range:
        """The rows of a batch that this rank holds; `n` must divide the number of rows."""
        each = n_rows // self.n
        return range(self.index * each, (self.index + 1) * each)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, of the same shape, without gradient."""
        if self.n == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def gathered(self, values: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, joined along their first dimension in the order of the ranks."""
        if self.n == 1:
            return values
        found = [torch.empty_like(values) for _ in range(self.n)]
        dist.all_gather(found, values.contiguous())
        return torch.cat(found)

    def gathered_any(self, value: T) -> list[T]:
        """The values of all ranks, such as tensors of different sizes, in the order of the ranks."""
        if self.n == 1:
            return [value]
        found: list[T | None] = [None] * self.n
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, which alone calls it; so a decision is the same on all ranks."""
        if self.n == 1:
            return make()
        held = [make() if self.first else None]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]  # type: ignore[return-value]

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks, in one sum for each type of number.

        A parameter without a gradient on any rank keeps none, as the optimiser of a single process would see it. A
        gate is judged at some steps only, which is why `DistributedDataParallel`, which waits for the gradients of
        all parameters that the output depends on, would wait for ever.
        """
        if self.n == 1:
            return
        by_type: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for group in by_type.values():
            there = self.sum(torch.tensor([p.grad is not None for p in group], dtype=torch.int32))  # on the host
            known = [p for p, count in zip(group, there.tolist(), strict=True) if count]
            if not known:
                continue
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in known])
            dist.all_reduce(flat)
            for parameter, total in zip(known, flat.div_(self.n).split([p.numel() for p in known]), strict=True):
                parameter.grad = total.view_as(parameter)

    @contextlib.contextmanager
    def batch(self, n_rows: int) -> Iterator[None]:
        """The context of a forward pass over this rank's rows of a batch; its means are over the whole batch."""
        if self.n == 1:
            yield
            return
        with part_of_batch(self.rows(n_rows).start, n_rows, self):
            yield


ALONE = Ranks()


@dataclass(frozen=True)
class _Part:
    start: int
    n_rows: int
    ranks: Ranks


_part: _Part | None = None


@contextlib.contextmanager
def part_of_batch(start: int, n_rows: int, ranks: Ranks = ALONE) -> Iterator[None]:
    """The context of a forward pass over some rows of a batch.

    Args:
        start: the first of these rows.
        n_rows: rows of the whole batch, for all of which `draw_rows` draws.
        ranks: ranks that make the same pass over the other rows, over which means are taken; `ALONE`: means are over
            the rows of the pass.
    """
    global _part
    before, _part = _part, _Part(start, n_rows, ranks)
    try:
        yield
    finally:
        _part = before


def draw_rows(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Random numbers of a shape whose first dimension is rows of a batch: those that the whole batch would get."""
    if _part is None:
        return draw(shape)
    return draw((_part.n_rows, *shape[1:]))[_part.start : _part.start + shape[0]]


def over_ranks() -> bool:
    """Whether means of this forward pass are taken over several ranks; all of them must then take the same means."""
    return _part is not None and _part.ranks.n > 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over the ranks that make this forward pass, without gradient; the value itself outside `Ranks.batch`."""
    if _part is None or not over_ranks():
        return value
    return _part.ranks.sum(value) / _part.ranks.n


def count_over_ranks(n: Tensor) -> Tensor:
    """Divisor of a sum over `n` entries of this rank: at least 1 over all ranks, divided by their number. Scalar."""
    if _part is None or not over_ranks():
        return n.clamp(min=1)
    return _part.ranks.sum(n).clamp(min=1) / _part.ranks.n


def share_over_ranks(share: Tensor) -> Tensor:
    """A mean by `count_over_ranks` with the value of the whole batch and the gradient of this rank's rows. Scalar."""
    mean = mean_over_ranks(share)
    return share if mean is share else share + (mean - share).detach()
