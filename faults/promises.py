"""Promises: simulated calibrations whose truth is known. A promise at level delta may break in that share, no more.

In each setting documents are drawn from a known law and candidates whose expected increases lie around the promised
one are tested as `cramlab consolidate` tests them. A promise is broken when a candidate passes whose true expected
increase is above it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.documents import parts_of
from cramlab.consolidation.guarantee import Guarantee, fixed_sequence
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import load
from cramlab.text import Corpus, Document
from faults.cases import Case, Fault, FaultFoundError, Measured, RefusedError
from faults.material import model_folder, words

Floats = NDArray[np.float64]
REPEATS = 300
# With so many settings, chance alone puts one below this once in some dozens of campaigns.
SURELY = 1e-4
LADDER = (0.2, 0.7, 0.95, 1.0001, 1.02, 1.2, 1.6)  # true expected increases, in units of the promised one


def _bell(rng: np.random.Generator, n: int) -> Floats:
    return rng.normal(0.0, 1.0, n)


def _rare(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.03, 30.0, 0.0)


def _heavy(rng: np.random.Generator, n: int) -> Floats:
    return rng.standard_t(1.5, n)


def _skewed(rng: np.random.Generator, n: int) -> Floats:
    return rng.pareto(1.8, n)


def _two(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.5, -1.0, 1.0)


def _mixed(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.8, rng.normal(-0.5, 0.1, n), rng.normal(2.0, 0.5, n))


def _still(rng: np.random.Generator, n: int) -> Floats:
    return rng.normal(0.0, 0.01, n)


LAWS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "bell": _bell, "rare disasters": _rare, "heavy tails": _heavy, "skewed": _skewed, "two values": _two,
    "mixed": _mixed, "hardly any spread": _still,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(Guarantee):
    """A promise that leaves out the bound that is only printed, which takes fifty times as long."""

    def upper_bound(self, increases: object) -> float:  # noqa: ARG002
        """Nothing."""
        return float("nan")


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """Laws, numbers of documents, levels and bounds, and spreads; then texts with copies."""
    grid = list(itertools.product(LAWS, (30, 64), (0.05, 0.1, 0.2), (2.0, 5.0, 20.0), (0.3, 3.0)))
    random.Random(seed).shuffle(grid)
    for law, n, delta, factor, spread in grid[: max(2, round(share * len(grid)))]:
        name = f"{law}, {n} documents, delta {delta}, bound {factor:g} times, spread {spread:g}"
        yield Case("promises about independent documents", name,
                   functools.partial(_setting, law, n, delta, factor, spread, f"{seed} {name}"))  # fmt: skip
    copies = list(itertools.product((40, 60, 80), (1, 2, 5, 16), ("exact", "near", "half of them")))
    for n_texts, times, how in copies[:: 1 if share == 1 else 9]:
        name = f"{n_texts} texts, each {times} times, {how}"
        yield Case("promises about texts with copies", name,
                   functools.partial(_copied, n_texts, times, how, f"{seed} {name}"))  # fmt: skip


def _setting(law: str, n: int, delta: float, factor: float, spread: float, seed: str) -> Measured:
    """Many calibrations; raises when more promises break than delta can explain."""
    rng = np.random.default_rng(list(seed.encode()))
    promise = Bare(increase=0.02, bound=0.02 * factor, delta=delta)
    atoms = LAWS[law](rng, 2000) * spread * promise.increase
    shifts = [_shift(atoms, rung * promise.increase, promise.bound) for rung in LADDER]
    broken = made = 0
    for _ in range(REPEATS):
        documents = rng.choice(atoms, n)
        tested = fixed_sequence(
            range(len(LADDER)), lambda i, documents=documents: (documents + shifts[i]).tolist(), promise
        )
        passed = [test.candidate for test in tested if test.p_value <= delta]
        made += bool(passed)
        broken += any(LADDER[candidate] > 1 for candidate in passed)
    if binom.sf(broken - 1, REPEATS, delta) < SURELY:
        raise FaultFoundError(Fault.WRONG, f"{broken} of {REPEATS} promises at delta {delta} broken")
    return {"repeats": REPEATS, "delta": delta, "made": made, "broken": broken}


def _shift(atoms: Floats, mean: float, bound: float) -> float:
    """What has to be added to the atoms so that their mean, each capped at the bound, is this."""
    low, high = -bound - float(atoms.max()), bound - float(atoms.min())
    for _ in range(80):
        middle = (low + high) / 2
        above = float(np.clip(atoms + middle, -bound, bound).mean()) > mean
        low, high = (low, middle) if above else (middle, high)
    return (low + high) / 2


SIZES = {"fit": 4, "sensitivity": 2, "gate": 3, "validation": 3, "calibration": 30, "test": 3}
WANTED = sum(SIZES.values())


def _copied(n_texts: int, times: int, how: str, seed: str) -> None:
    """No text may be drawn twice, under whatever names and with whatever few letters changed; too few are refused."""
    rng = random.Random(seed)
    pretrained = load(str(model_folder()))
    documents = []
    for i in range(n_texts):
        text = f"{i:03} " + words(rng, 200)
        for n in range(times if how != "half of them" or i % 2 else 1):
            letters = list(text)
            for place in rng.sample(range(4, 90), 2) if how == "near" and n else ():
                letters[place] = rng.choice("qxz")
            documents.append(Document(f"{n}/{i}", "".join(letters)))
    rng.shuffle(documents)
    sizes = {f"{part}_documents": size for part, size in SIZES.items()}
    config = ConsolidationConfig(context=96, window=8, n_sinks=2, local_steps=1, end_steps=1, **sizes)
    try:
        parts = parts_of(pretrained, Corpus("copies", tuple(documents)), config)
    except ConsolidationError as error:
        if n_texts >= WANTED:
            raise FaultFoundError(Fault.WRONG, f"refused, which is wrong: {error}"[:240]) from error
        raise RefusedError(str(error)) from error
    if n_texts < WANTED:
        raise FaultFoundError(Fault.ACCEPTED, f"{n_texts} texts were taken for {WANTED} documents")
    drawn = [_number(tokens) for part in SIZES for tokens in parts[part]]
    if len(set(drawn)) < len(drawn):
        raise FaultFoundError(Fault.WRONG, f"{len(drawn) - len(set(drawn))} of {len(drawn)} documents are copies")
    held_out = {_number(tokens) for part in ("validation", "calibration", "test") for tokens in parts[part]}
    if learned := held_out & {_number(tokens) for tokens in parts["learning"]}:
        raise FaultFoundError(Fault.WRONG, f"{len(learned)} texts are learned from and held out")


def _number(tokens: Tensor) -> tuple[int, ...]:
    """The number that a text begins with, in tokens."""
    return tuple(tokens[:3].tolist())
