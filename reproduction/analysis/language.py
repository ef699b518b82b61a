"""What the records of language models say: attention, differences between arms, the best fixed layer, familiarity.

A record is that of `reproduction.protocols.language`; `arms` has the records of a corpus by arm, one for each seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cramlab.report.intervals import Interval, seed_interval
from reproduction.analysis.practice import Binomial, compare

Record = dict[str, Any]
Arms = Mapping[str, Sequence[Record]]

BUDGET = 0.125  # of attention, mean over layers: one layer of eight
FREQUENT = 1000  # n-grams seen at least so often in training are consolidated, if any are
FEWEST = 50  # tokens of a cell whose share of reads counts
N_CELLS = 200  # tokens of a bin of the practice curve


def nats(record: Record) -> float:
    """Loss on the test text, nats a token."""
    return record["test"]["all"]["nats"]


def attention(record: Record) -> float:
    """Share of the tokens of the test text that read all before them, mean over layers."""
    if record["config"]["model"] != "cram":
        return 1.0 if record["config"].get("window") is None else 0.0
    return record["test"]["all"]["reads_frac"] or 0.0


def pairs(record: Record) -> float:
    """Query-key pairs that are scored, windows included, as a share of those of full attention in all layers."""
    config = record["config"]
    window, rows = config.get("window") or 0, record["test"]["by_position"]
    if config["model"] == "cram":
        of_layers = config["cram"].get("memory_layers")
        remembering = 1.0 if of_layers is None else len(of_layers) / config["n_layers"]
        near = 0.0 if not window or config["cram"].get("router") == "always" else remembering
    else:
        near = 1.0 if window else 0.0
    scored = whole = 0.0
    for row in rows:
        seen = np.arange(row["first"], row["last"] + 1, dtype=float)  # keys of each token of the bin, itself included
        far = row["reads_frac"] if row["reads_frac"] is not None else 1.0 - near
        scored += far * seen.sum() + max(0.0, near - far) * np.minimum(seen, window).sum()
        whole += seen.sum()
    return float(scored / whole)


def recalled(record: Record, task: str, size: str, n: int) -> float | None:
    """Accuracy in a task of recall at a size; None: it was not tried."""
    return next((row["accuracy"] for row in record["recall"][task] if row[size] == n), None)


def by_seed(arms: Arms, arm: str, value: Callable[[Record], float | None]) -> dict[int, float]:
    """A value of each run of an arm that has it, by seed."""
    found = {record["config"]["seed"]: value(record) for record in arms.get(arm, ())}
    return {seed: number for seed, number in found.items() if number is not None}


def difference(arms: Arms, arm: str, other: str, value: Callable[[Record], float | None] = nats) -> Interval | None:
    """The value of an arm minus that of another, paired by seed; None: they share no seed."""
    one, two = by_seed(arms, arm, value), by_seed(arms, other, value)
    seeds = sorted(one.keys() & two.keys())
    return seed_interval([one[seed] - two[seed] for seed in seeds]) if seeds else None


def best_fixed(arms: Arms) -> str | None:
    """The arm with the lowest loss on validation text among those with one layer of eight that always reads, alone."""
    losses = {arm: statistics.fmean(run["validation_nats"] for run in runs) for arm, runs in arms.items()
              if _is_fixed(runs[0]["config"])}  # fmt: skip
    return min(losses, key=lambda arm: losses[arm]) if losses else None


def _is_fixed(config: dict[str, Any]) -> bool:
    plain = config["model"] == "cram" and config["cram"].get("router") == "always"
    if not plain or config.get("bigram_slots") or config.get("window"):
        return False
    return 0 < len(config["cram"]["memory_layers"]) <= BUDGET * config["n_layers"]


def familiarity(record: Record, n_gram: str) -> float | None:
    """Share of reads at tokens whose n-gram is frequent in training, minus that at equally hard ones never seen.

    Tokens are compared within bins of their loss without reads; bins count by the number of tokens of the rarer kind.
    None: the model reports no reads, or no bin has enough tokens of both kinds.
    """
    fresh, frequent = _cells(record, n_gram, 0, 0), _cells(record, n_gram, FREQUENT, None)
    total = weight = 0.0
    for bin_, (n, share) in fresh.items():
        n_other, other = frequent.get(bin_, (0, 0.0))
        if min(n, n_other) >= FEWEST:
            total += min(n, n_other) * (other - share)
            weight += min(n, n_other)
    return total / weight if weight else None


def _cells(record: Record, n_gram: str, low: int, high: int | None) -> dict[float, tuple[int, float]]:
    """Tokens and share of reads by hardness, of n-grams seen from `low` to `high` times (None: no upper bound)."""
    found: dict[float, tuple[int, float]] = {}
    for row in record["test"]["by_count_and_nats"][n_gram]:
        inside = row["count_from"] >= low and (high is None or row["count_from"] <= high)
        if inside and row["n"] and row["reads_frac"] is not None:
            n, share = found.get(row["nats_from"], (0, 0.0))
            both = n + row["n"]
            found[row["nats_from"]] = both, (n * share + row["n"] * row["reads_frac"]) / both
    return found


def practice_curve(runs: Sequence[Record], n_gram: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chance to read against encounters in training: encounters, share of reads and tokens, each (N,).

    The first entry is that of no encounter. Bins with fewer than `N_CELLS` tokens are left out.
    """
    rows = [row for run in runs for row in run["test"]["by_count"][n_gram] if row["reads_frac"] is not None]
    points = []
    for low in sorted({row["count_from"] for row in rows}):
        here = [row for row in rows if row["count_from"] == low]
        n, high = sum(row["n"] for row in here), here[0]["count_to"]
        if n >= N_CELLS:
            share = sum(row["n"] * row["reads_frac"] for row in here) / n
            points.append((float(np.sqrt(low * (high or 2 * low))), share, n))
    return tuple(np.array(points).reshape(-1, 3).T)  # type: ignore[return-value]


def practice_law(runs: Sequence[Record], n_gram: str) -> tuple[str, float] | None:
    """The likeliest of the five laws of practice, and the power law's exponent; None: too few bins."""
    k, share, n = practice_curve(runs, n_gram)
    seen = k >= 1
    if len(np.unique(k[seen])) < 4:
        return None
    fits = compare(k[seen], Binomial(np.round(share * n)[seen], n[seen]))
    return next(iter(fits)), fits["power"].parameters["exponent"]
