"""Layers: padding, batch, step and pieces do not matter to a mixer, nor do future tokens and other sequences."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cramlab.mixer import Routing
from faults.cases import Case
from faults.equal import EXACT, case, pieces, same
from faults.models import D_MODEL, mixer, mixers


def cases(seed: int, share: float) -> Iterator[Case]:
    """Every mixer, with several weights and inputs."""
    for name in list(mixers())[:: 1 if share == 1 else 7]:
        for number in range(max(1, round(4 * share))):
            for test, check in CHECKS.items():
                yield case(f"layers: {test}", f"{name}: {test} #{number}", check, name, 1000 * seed + number)


def _sequence(n_batch: int, n_tokens: int, seed: int) -> tuple[Tensor, Tensor, Routing]:
    """Random inputs, gaps and reads of an oracle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_batch, n_tokens, D_MODEL, generator=generator, dtype=torch.float64)
    gaps = 3 * torch.rand(n_batch, n_tokens, generator=generator, dtype=torch.float64)
    return x, gaps, Routing(oracle_reads=torch.rand(n_batch, n_tokens, generator=generator) < 0.3)


def _some(routing: Routing, *index: Any) -> Routing:
    """The routing of some tokens."""
    assert routing.oracle_reads is not None
    return routing._replace(oracle_reads=routing.oracle_reads[index])


def _layer_padding(side: str) -> Callable[[str, int], None]:
    def check(name: str, seed: int) -> None:
        rng = random.Random(seed)
        n, padding = rng.randint(8, 40), rng.randint(1, 9)
        layer, (x, gaps, routing) = mixer(name, seed), _sequence(2, n, seed)
        wanted = layer(x, gaps, routing=routing).y
        whole = n + padding
        at = slice(padding, whole) if side == "left" else slice(0, n)
        wide_x, wide_gaps = torch.full((2, whole, D_MODEL), torch.nan).double(), torch.full((2, whole), -1.0).double()
        valid, oracle = torch.zeros(2, whole, dtype=torch.bool), torch.ones(2, whole, dtype=torch.bool)
        wide_x[:, at], wide_gaps[:, at], valid[:, at] = x, gaps, True
        oracle[:, at] = routing.oracle_reads
        found = layer(wide_x, wide_gaps, valid=valid, routing=Routing(oracle_reads=oracle))
        same(found.y[:, at], wanted, EXACT, f"padding on the {side}")

    return check


def _layer_batch(name: str, seed: int) -> None:
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(5, 24, seed)
    together = layer(x, gaps, routing=routing).y
    for row in range(5):
        at = slice(row, row + 1)
        same(layer(x[at], gaps[at], routing=_some(routing, at)).y, together[at], EXACT, f"row {row} alone")


def _layer_steps(name: str, seed: int) -> None:
    _layer_parts(name, seed, [1] * 24)


def _layer_chunks(name: str, seed: int) -> None:
    _layer_parts(name, seed, pieces(40, random.Random(seed)))


def _layer_parts(name: str, seed: int, lengths: list[int]) -> None:
    n = sum(lengths)
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(2, n, seed)
    wanted, state, found, start = layer(x, gaps, routing=routing).y, None, [], 0
    for length in lengths:
        at = slice(start, start + length)
        output = layer(x[:, at], gaps[:, at], state, routing=_some(routing, slice(None), at))
        state, start = output.state, start + length
        found.append(output.y)
    same(torch.cat(found, dim=1), wanted, EXACT, f"in {len(lengths)} calls")


def _layer_future(name: str, seed: int) -> None:
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(2, 30, seed)
    cut = random.Random(seed).randint(1, 29)
    other_x, other_gaps = x.clone(), gaps.clone()
    other_x[:, cut:], other_gaps[:, cut:] = -2 * x[:, cut:] + 1, 7.0
    found = layer(other_x, other_gaps, routing=routing).y[:, :cut]
    same(found, layer(x, gaps, routing=routing).y[:, :cut], EXACT, f"tokens from {cut} on are others")


def _layer_others(name: str, seed: int) -> None:
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(3, 30, seed)
    other_x, other_gaps = x.clone(), gaps.clone()
    other_x[1:], other_gaps[1:] = 5 * x[1:] - 3, 0.1
    found = layer(other_x, other_gaps, routing=routing).y[:1]
    same(found, layer(x, gaps, routing=routing).y[:1], EXACT, "the other sequences are others")


CHECKS: dict[str, Callable[[str, int], None]] = {
    "padding on the left": _layer_padding("left"),
    "padding on the right": _layer_padding("right"),
    "batch of one against many": _layer_batch,
    "step by step against one pass": _layer_steps,
    "in pieces against one pass": _layer_chunks,
    "future tokens do not matter": _layer_future,
    "other sequences do not matter": _layer_others,
}
