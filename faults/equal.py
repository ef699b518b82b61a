"""What equal means: two tensors, within a share of their scale, or bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from faults.cases import Case, Fault, FaultFoundError

EXACT = 1e-9  # in float64


def case(test: str, name: str, check: Callable[..., None], *given: Any) -> Case:
    """A case of a check without gradients."""

    def tried() -> None:
        with torch.no_grad():
            check(*given)

    return Case(test, name, tried)


def same(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raises unless two tensors are equal within a share of the larger one's scale; 0: bit by bit."""
    if found.shape != wanted.shape:
        raise FaultFoundError(Fault.WRONG, f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if bool(torch.equal(found, wanted)):
        return
    off = float((found.double() - wanted.double()).abs().max())
    scale = max(1.0, float(wanted.double().abs().max()))
    if not off <= tolerance * scale:
        raise FaultFoundError(Fault.WRONG, f"{what}: off by {off:.3g} at a scale of {scale:.3g}")


def pieces(n: int, rng: random.Random) -> list[int]:
    """Lengths of consecutive parts that make n, some of them a single token."""
    found: list[int] = []
    while (left := n - sum(found)) > 0:
        found.append(min(left, rng.choice((1, 1, 2, 3, 5, 9))))
    return found
