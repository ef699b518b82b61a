"""SRCD with change: at a known time, a share of the recurring patterns gets other values, and new patterns appear.

Time is the index of a sequence in its split. Everything but the values (and, before they appear, the keys) of the
patterns concerned is SRCD's. A model that answers a rebound pattern from memory is wrong until it notices and learns.

The least reads are those of who is told which patterns change and when, but not to what: every novel query, and the
first query of a pattern since its last change. Before the change that is SRCD's optimum, and again once every pattern
that has changed has been asked for once.

Source: ours.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from cramlab.batch import Batch
from cramlab.config import ConfigError, CountOrZero, Share, Size, checked
from cramlab.tasks.srcd import SRCDConfig, collate, patterns, sample
from cramlab.tasks.task import SPLITS, Split

VERSION = 1
_STREAM = 303  # spawn key of the generators that draw what changes


@checked("task")
class ChangingConfig(SRCDConfig):
    """The fields of SRCD and those of the change.

    Attributes:
        change_at: index of the first sequence after the change.
        changed_frac: share of the patterns that are rebound to another value.
        change: "abrupt": all at `change_at`. "gradual": one after another over `period` sequences. "recurring": all at
            `change_at`, back after `period` sequences, and so on.
        period: number of sequences, for "gradual" and "recurring".
        new_frac: share of the patterns that appear at `change_at`. Before, their queries ask for novel keys instead.
    """

    change_at: CountOrZero = 1000
    changed_frac: Share = 0.3
    change: Literal["abrupt", "gradual", "recurring"] = "abrupt"
    period: Size = 200
    new_frac: Share = 0.0

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        super().__post_init__()
        if self.changed_frac + self.new_frac > 1:
            raise ConfigError(
                f"task.changed_frac + task.new_frac = {self.changed_frac + self.new_frac:g} exceeds 1: a pattern is "
                "rebound or new; lower one"
            )
        if self.new_frac and self.key_mode == "token":
            raise ConfigError(
                f'task.new_frac = {self.new_frac} needs task.key_mode = "vector": ids of new patterns would be known'
            )
        if self.rebind_frac:
            raise ConfigError(f"task.rebind_frac = {self.rebind_frac} must be 0: here patterns change for good")

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices as one batch; slices "unchanged", "changed" and "new" are added.

        "rebound" holds the first query of a pattern since its last change, which must be read; "recurring" the others.
        """
        samples = [changed_sample(self, seed=seed, split=split, index=i) for i in indices]
        batch = collate(self, samples)
        of = batch.pattern.numpy()
        which = affected(self, seed)
        after = np.array(indices)[:, None] >= self.change_at
        kinds = {"changed": which.rebound[of], "new": which.new[of] & after}
        kinds["unchanged"] = ~which.rebound[of] & ~which.new[of]
        known = of >= 0
        slices = {name: batch.valid.new_tensor(mask & known) for name, mask in kinds.items()}
        return batch._replace(slices={**batch.slices, **slices})


class Affected:
    """Which patterns change.

    Attributes:
        rebound: bool (n_patterns,).
        new: bool (n_patterns,).
        values: the other value of each pattern, (n_patterns,).
        starts: index of the sequence at which each rebound pattern first changes, or a new one appears.
    """

    def __init__(self, config: ChangingConfig, seed: int) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
        n = config.n_patterns
        order = rng.permutation(n)
        n_rebound, n_new = round(config.changed_frac * n), math.floor(config.new_frac * n)
        self.rebound, self.new = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        self.rebound[order[:n_rebound]] = True
        self.new[order[n - n_new :]] = True
        shift = rng.integers(1, config.n_values, size=n)
        self.values = (patterns(config, seed).values + shift) % config.n_values
        self.starts = np.full(n, config.change_at)
        if config.change == "gradual":
            self.starts[order[:n_rebound]] += np.arange(n_rebound) * config.period // max(1, n_rebound)


@functools.lru_cache(maxsize=16)
def affected(config: ChangingConfig, seed: int) -> Affected:
    """What changes under a seed."""
    return Affected(config, seed)


def last_change(config: ChangingConfig, seed: int, pattern: int, index: int) -> int | None:
    """Index of the sequence at which a pattern last changed or appeared, up to a sequence; None: it has not."""
    which = affected(config, seed)
    start = int(which.starts[pattern])
    if index < start or not (which.rebound[pattern] or which.new[pattern]):
        return None
    if config.change == "recurring" and which.rebound[pattern]:
        return start + (index - start) // config.period * config.period
    return start


def has_other_value(config: ChangingConfig, seed: int, pattern: int, index: int) -> bool:
    """Whether a pattern has its other value in a sequence."""
    which = affected(config, seed)
    if not which.rebound[pattern] or index < which.starts[pattern]:
        return False
    periods = (index - int(which.starts[pattern])) // config.period
    return config.change != "recurring" or periods % 2 == 0


@functools.lru_cache(maxsize=256)
def _sampled(config: SRCDConfig, seed: int, split: Split, index: int) -> dict[str, np.ndarray]:
    """The sequence without change, which is not to be written to."""
    return sample(config, seed=seed, split=split, index=index)


@functools.lru_cache(maxsize=65536)
def _asked(config: SRCDConfig, seed: int, split: Split, index: int) -> frozenset[int]:
    """Patterns that a sequence asks for."""
    found = _sampled(config, seed, split, index)["pattern"]
    return frozenset(found[found >= 0].tolist())


def first_asked(config: ChangingConfig, seed: int, split: Split, pattern: int, start: int, index: int) -> bool:
    """Whether a sequence, which asks for a pattern, is the first to do so from the sequence `start` on."""
    plain = _unchanged(config)
    return not any(pattern in _asked(plain, seed, split, i) for i in range(start, index))


@functools.lru_cache(maxsize=16)
def _unchanged(config: ChangingConfig) -> SRCDConfig:
    """The config of the same sequences without change."""
    names = SRCDConfig.__dataclass_fields__
    return SRCDConfig(**{name: value for name, value in asdict(config).items() if name in names})


def changed_sample(config: ChangingConfig, *, seed: int, split: Split, index: int) -> dict[str, np.ndarray]:
    """Draws one sequence; arrays and errors are those of `srcd.sample`."""
    plain = _sampled(_unchanged(config), seed, split, index)
    out = {name: values.copy() for name, values in plain.items()}
    which = affected(config, seed)
    spawn_key = (_STREAM, SPLITS.index(split), index)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))
    for query in np.flatnonzero(out["pattern"] >= 0):
        pattern, write = int(out["pattern"][query]), int(out["write_position"][query])
        if which.new[pattern] and index < config.change_at:
            value = int(rng.integers(config.n_values))
            key = rng.standard_normal(config.key_dim)
            difference = key / np.linalg.norm(key) - patterns(config, seed).keys[pattern]
            out["key"][[write, query]] += difference
            out["recurring"][query], out["novel"][query], out["pattern"][query] = False, True, -1
        elif (changed := last_change(config, seed, pattern, index)) is None:
            continue
        else:
            value = int(out["answer"][query])
            if has_other_value(config, seed, pattern, index):
                value = int(which.values[pattern])
            out["rebound"][query] = first_asked(config, seed, split, pattern, changed, index)
        out["value"][write] = out["answer"][query] = value
    return out


def least_reads(config: ChangingConfig, indices: range, *, seed: int, split: Split) -> dict[str, Any]:
    """Reads of who is told which patterns change and when: the share of tokens, and the number for what changed.

    Args:
        config: the task.
        indices: sequences.
        seed: seed of the data.
        split: split of the data.
    """
    samples = [changed_sample(config, seed=seed, split=split, index=i) for i in indices]
    novel, first = (np.stack([one[name] for one in samples]) for name in ("novel", "rebound"))
    return {"attention_frac": float((novel | first).mean()), "reads_of_changed": int(first.sum())}


def memoriser_acc(config: ChangingConfig, indices: range, *, seed: int) -> float:
    """Expected accuracy of a memoriser that never notices: values are those before the change, novel keys are guessed.

    Args:
        config: the task.
        indices: sequences.
        seed: seed of the data.
    """
    which, guess = affected(config, seed), 1 / config.n_values
    by_sequence = []
    for i in indices:
        wrong = sum(has_other_value(config, seed, p, i) for p in np.flatnonzero(which.rebound).tolist())
        new = int(which.new.sum())
        right = (config.n_patterns - wrong - new + new * guess) / config.n_patterns
        by_sequence.append(config.recurring_frac * right + (1 - config.recurring_frac) * guess)
    return float(np.mean(by_sequence))
