"""SRCD, Sparse Retrieval in Continuous Dynamics (paper sec. 6), version 1.

One sequence, drawn small (N = 12, `.` is nothing)::

    position   0     1     2     3     4     5     6     7     8     9     10    11
    gap        1.0   2.3   1.1   1.4   7.9   1.2   1.0   3.1   1.6   1.1   2.2   1.3
    level      4.1   4.2   4.4   4.5   4.7   4.4   4.6   4.7   4.9   5.1   5.0   5.2
    kind       flow  write flow  write flow  query flow  write flow  flow  query flow
    key        .     k7    .     n1    .     k7    .     n2    .     .     n1    .
    value      .     31    .     8     .     .     .     55    .     .     .     .
    answer     .     .     .     .     .     31    .     .     .     .     8     .
    next level 4.2   4.4   4.5   4.7   4.4   4.6   4.7   4.9   5.1   5.0   5.2   5.3

`k7` is one of the recurring patterns: it always means 31, in every sequence, so a parametric memory can come to
answer it. `n1` was made for this sequence alone: only looking back can answer it. `n2` is never asked for.
Every queried key, recurring or novel, is written exactly once in its sequence, before its one query, at a place
and a distance drawn from the same law: the two differ in nothing but their history in other sequences.

The level follows `v[t] = 0.95 v[t-1] + beta sin(omega gap[t]) + noise`, gaps are Pareto(1.5). The horizon (the gap to
the next event) is given, so the best possible mean squared error is the variance of the noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cramlab.batch import Batch, InputSpec
from cramlab.config import ConfigError, Share, Size, checked

VERSION = 1
FLOW, WRITE, QUERY = 0, 1, 2
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_PATTERN_STREAM = 101  # spawn key of the stream that draws the recurring patterns; splits use 0, 1, 2
_ARRAYS = (
    "kind", "value", "key_id", "key", "gap", "horizon", "level", "next_level", "answer", "recurring", "novel",
    "rebound", "pattern",
)  # fmt: skip
_Scale = Annotated[float, Field(ge=0, le=1e6)]
_SPLIT_SHARES = (6, 1, 1)  # how the (key, value) pairs of novel token keys are shared out among the splits


@checked("task")
class SRCDConfig:
    """Every choice of the generator. Marked (paper) where the paper fixes it; the others are ours, with the reason.

    Attributes:
        seq_len: tokens a sequence, N (paper: 2048).
        query_frac: share of tokens that ask for an earlier binding (paper: 0.05).
        recurring_frac: probability that a queried binding is a recurring pattern (paper: 0.7).
        n_patterns: size of the fixed set of recurring bindings (paper: 100).
        write_frac: share of tokens that write a binding. Twice `query_frac`: every second binding is never asked
            for, so that a model cannot answer by elimination, and a buffer of bindings is still a tenth of the
            sequence. Bindings that are never asked for are always novel, as 100 patterns would not go round.
        rebind_frac: probability that a recurring key means another value in this sequence. 0 as in the paper;
            above it, blind trust in a parametric memory fails.
        key_mode: "vector": a key is a unit vector seen through noise, so familiarity must be judged.
            "token": a key is an id, so familiarity can be looked up.
        key_dim: dimensions of a vector key. 16: a few hundred keys stay well apart (nearest about 45 degrees).
        key_noise: standard deviation of the noise on each coordinate of a vector key, drawn anew at write and
            query. 0.02: small against the distance between keys, so that the oracle stays exact.
        n_novel_keys: ids that novel token keys are drawn from. 1024: ten times the patterns, each id seen often
            enough to be embedded, each with too many values to be memorised. A pair of novel id and value belongs
            to one split: six eighths to train, one each to validation and test. Known shortcut: who knows this
            rule (ours, `_split_of_binding`) guesses novel test values at 8 in 64 instead of 1 in 64.
        n_values: possible values of a binding. 64: chance is 1.6%, far from every figure of interest.
        decay: of the level (paper: 0.95); at most 0.9999, as a sequence is preceded by what its level remembers.
        beta: size of the drive. 0.5: a model that knows only the drive's mean has almost three times the error.
        omega: angular frequency of the drive, radians a time unit. 0.3: 99% of the gaps lie within one period and
            99.9% within five, so that a smooth function approximator can reach the noise floor.
        gap_shape: of the Pareto law of gaps, smallest gap 1 (paper: 1.5; the scale is ours). At least 0.5: below,
            a gap can exceed what 32 bits hold.
        noise_std: of the level. 0.1: the best possible mean squared error is 0.01.
    """

    seq_len: Annotated[int, Field(ge=2, le=2**20)] = 2048
    query_frac: Share = 0.05
    recurring_frac: Share = 0.7
    n_patterns: Size = 100
    write_frac: Share = 0.10
    rebind_frac: Share = 0.0
    key_mode: Literal["vector", "token"] = "vector"
    key_dim: Annotated[int, Field(ge=1, le=4096)] = 16
    key_noise: _Scale = 0.02
    n_novel_keys: Size = 1024
    n_values: Annotated[int, Field(ge=2, le=2**20)] = 64
    decay: Annotated[float, Field(ge=0, le=0.9999)] = 0.95
    beta: _Scale = 0.5
    omega: _Scale = 0.3
    gap_shape: Annotated[float, Field(ge=0.5, le=1e6)] = 1.5
    noise_std: _Scale = 0.1

    def __post_init__(self) -> None:
        """Refuses what cannot be generated; each error names the field, the value and the fix."""
        if self.key_mode == "token" and self.n_values < 2 * sum(_SPLIT_SHARES):
            raise ConfigError(
                f"task.n_values = {self.n_values} is too few to share bindings among the splits; "
                f"give at least {2 * sum(_SPLIT_SHARES)}"
            )
        if self.write_frac < self.query_frac:
            raise ConfigError(
                f"task.write_frac = {self.write_frac} is below task.query_frac = {self.query_frac}, but every query "
                "needs a binding of its own; raise write_frac"
            )
        if self.write_frac + self.query_frac > 1:
            raise ConfigError(
                f"task.write_frac + task.query_frac = {self.write_frac + self.query_frac} exceeds 1; lower one"
            )
        mean = self.recurring_frac * self.query_frac * self.seq_len
        most = math.ceil(mean + 4 * math.sqrt(mean * (1 - self.recurring_frac)))  # hardly ever exceeded
        if most > self.n_patterns:
            raise ConfigError(
                f"task.n_patterns = {self.n_patterns} is too few: up to {most} recurring queries of one sequence must "
                "differ; raise n_patterns, or lower seq_len, query_frac or recurring_frac"
            )
        if self.key_mode == "token" and self.write_frac * self.seq_len + 1 > self.n_novel_keys:
            raise ConfigError(
                f"task.n_novel_keys = {self.n_novel_keys} is fewer than the bindings of one sequence; "
                f"give at least {math.ceil(self.write_frac * self.seq_len) + 1}"
            )

    @property
    def input_spec(self) -> InputSpec:
        """Channels: kind, value (and key id); level (and key vector)."""
        if self.key_mode == "token":
            n_keys = self.n_patterns + self.n_novel_keys + 1
            return InputSpec(vocab_sizes=(3, self.n_values + 1, n_keys), n_continuous=1, n_classes=self.n_values)
        return InputSpec(vocab_sizes=(3, self.n_values + 1), n_continuous=1 + self.key_dim, n_classes=self.n_values)

    @property
    def dynamics_floor(self) -> float:
        """The least possible mean squared error of the next level: the variance of its noise."""
        return self.noise_std**2

    @property
    def expected_attention_frac(self) -> float:
        """Query share times the share that no earlier sequence can have taught: the least attention, on average."""
        return self.query_frac * (1 - self.recurring_frac * (1 - self.rebind_frac))

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> SRCDDataset:
        """An endless stream of batches; see `SRCDDataset`."""
        return SRCDDataset(self, seed=seed, split=split, batch_size=batch_size, start=start)


TINY = SRCDConfig(seq_len=64, n_patterns=16)
SMALL = SRCDConfig(seq_len=256)
MEDIUM = SRCDConfig(seq_len=512)
PAPER = SRCDConfig(seq_len=2048)
SIZES: dict[str, SRCDConfig] = {"tiny": TINY, "small": SMALL, "medium": MEDIUM, "paper": PAPER}


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """The fixed set of recurring bindings: `keys` (P, key_dim) unit vectors, `values` (P,)."""

    keys: np.ndarray
    values: np.ndarray


@functools.lru_cache(maxsize=16)
def _patterns(n_patterns: int, key_dim: int, n_values: int, seed: int) -> Patterns:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PATTERN_STREAM,)))
    keys = _unit_rows(rng.standard_normal((n_patterns, key_dim)))
    return Patterns(keys=keys, values=rng.integers(n_values, size=n_patterns))


def patterns(config: SRCDConfig, seed: int) -> Patterns:
    """The recurring bindings of this seed. They do not depend on the length, so lengths can be mixed in training."""
    return _patterns(config.n_patterns, config.key_dim, config.n_values, seed)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _split_of_binding(key_ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The split that owns each novel (key id, value) pair: a fixed colouring, so that no two splits share a pair."""
    colour = (key_ids * 5 + values) % sum(_SPLIT_SHARES)
    return np.searchsorted(np.cumsum(_SPLIT_SHARES), colour, side="right")


def _novel_values(config: SRCDConfig, rng: np.random.Generator, key_ids: np.ndarray, split: int) -> np.ndarray:
    """A value for each novel key. Token keys may only be bound within their split; vector keys never come twice."""
    values = rng.integers(config.n_values, size=len(key_ids))
    if config.key_mode == "token":
        while (wrong := _split_of_binding(key_ids, values) != split).any():
            values[wrong] = rng.integers(config.n_values, size=int(wrong.sum()))
    return values


def _stochastic_round(rng: np.random.Generator, x: float) -> int:
    """An integer whose mean is x, so that short sequences keep the stated shares."""
    return math.floor(x) + int(rng.random() < x - math.floor(x))


def check_stream(split: str, **numbers: int) -> None:
    """Whether a split and numbers of seeds and sequences can be drawn from.

    Raises:
        ValueError: naming the argument, its value and the fix.
    """
    if split not in SPLITS:
        raise ValueError(f'split "{split}" is unknown; give one of {", ".join(SPLITS)}')
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise ValueError(f"{name} = {number!r} must be a whole number from 0")


def sample(config: SRCDConfig, *, seed: int, split: Split, index: int) -> dict[str, np.ndarray]:
    """One sequence as named arrays: a function of its arguments alone, whatever any global random state.

    Args:
        config: the generator.
        seed: of the run; also draws the recurring patterns.
        split: "train", "validation" or "test".
        index: which sequence of the split, from 0.

    Returns:
        `kind`, `value`, `key_id` (-1: none), `key` (N, key_dim), `gap`, `horizon`, `level`, `next_level`, `answer`
        (-1: none), `recurring`, `novel`, `rebound` (bool), `write_position` and `pattern` (-1: none); all of length N.

    Raises:
        ValueError: when there is no such split, seed or index.
    """
    check_stream(split, seed=seed, index=index)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))
    n = config.seq_len
    n_queries = min(_stochastic_round(rng, config.query_frac * n), n // 2)
    n_writes = min(max(n_queries, _stochastic_round(rng, config.write_frac * n)), n - n_queries)
    n_recurring = min(int(rng.binomial(n_queries, config.recurring_frac)), config.n_patterns)

    # Bindings 0..n_recurring-1 are patterns, the next ones up to n_queries novel and queried, the rest novel and not.
    known = patterns(config, seed)
    chosen = rng.choice(config.n_patterns, size=n_recurring, replace=False)
    n_novel = n_writes - n_recurring
    if config.key_mode == "token":
        novel_ids = config.n_patterns + rng.choice(config.n_novel_keys, size=n_novel, replace=False)
        novel_keys = np.zeros((n_novel, config.key_dim))
    else:
        novel_ids = np.full(n_novel, -1)
        novel_keys = _unit_rows(rng.standard_normal((n_novel, config.key_dim)))
    rebound = rng.random(n_recurring) < config.rebind_frac
    shift = np.where(rebound, rng.integers(1, config.n_values, size=n_recurring), 0)
    binding_key = np.concatenate([known.keys[chosen], novel_keys])
    binding_id = np.concatenate([chosen, novel_ids])
    binding_value = np.concatenate(
        [
            (known.values[chosen] + shift) % config.n_values,
            _novel_values(config, rng, novel_ids, SPLITS.index(split)),
        ]
    )

    # Two places for each queried binding, write at the earlier; one for each of the others.
    places = rng.permutation(n)[: n_writes + n_queries]
    pairs = np.sort(places[: 2 * n_queries].reshape(n_queries, 2), axis=1)
    write_at = np.concatenate([pairs[:, 0], places[2 * n_queries :]])
    query_at = pairs[:, 1]

    out = _event_arrays(config, rng, n, write_at, query_at, binding_key, binding_id, binding_value)
    queried = np.arange(n_queries)
    out["recurring"][query_at] = queried < n_recurring
    out["novel"][query_at] = queried >= n_recurring
    out["rebound"][query_at[:n_recurring]] = rebound
    out["pattern"][query_at[:n_recurring]] = chosen
    return out | _dynamics(config, rng, n)


def _event_arrays(
    config: SRCDConfig,
    rng: np.random.Generator,
    n: int,
    write_at: np.ndarray,
    query_at: np.ndarray,
    binding_key: np.ndarray,
    binding_id: np.ndarray,
    binding_value: np.ndarray,
) -> dict[str, np.ndarray]:
    """Lays writes and queries out over the n positions."""
    n_queries = len(query_at)
    kind = np.full(n, FLOW)
    value = np.full(n, config.n_values)  # the id that says "no value here"
    key_id = np.full(n, -1)
    key = np.zeros((n, config.key_dim))
    answer = np.full(n, -1)
    write_position = np.full(n, -1)
    kind[write_at], kind[query_at] = WRITE, QUERY
    value[write_at] = binding_value
    key_id[write_at], key_id[query_at] = binding_id, binding_id[:n_queries]
    if config.key_mode == "vector":
        noise = config.key_noise * rng.standard_normal((len(write_at) + n_queries, config.key_dim))
        key[write_at] = binding_key + noise[: len(write_at)]
        key[query_at] = binding_key[:n_queries] + noise[len(write_at) :]
    answer[query_at] = binding_value[:n_queries]
    write_position[query_at] = write_at[:n_queries]
    masks = {name: np.zeros(n, dtype=bool) for name in ("recurring", "novel", "rebound")}
    return {
        "kind": kind,
        "value": value,
        "key_id": key_id,
        "key": key,
        "answer": answer,
        "write_position": write_position,
        "pattern": np.full(n, -1),
    } | masks


def _dynamics(config: SRCDConfig, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Gaps and levels; the recursion has run long enough before position 0 to have forgotten where it began."""
    from scipy.signal import lfilter  # here, so that a layer can be had where there is no scipy

    burn_in = math.ceil(math.log(1e-3) / math.log(config.decay)) if 0 < config.decay < 1 else 0
    gap = 1.0 + rng.pareto(config.gap_shape, size=burn_in + n + 1)
    drive = config.beta * np.sin(config.omega * gap) + config.noise_std * rng.standard_normal(len(gap))
    level = np.asarray(lfilter([1.0], [1.0, -config.decay], drive))
    gap, level = gap[burn_in:], level[burn_in:]
    return {"gap": gap[:n], "horizon": gap[1:], "level": level[:n], "next_level": level[1:]}


class SRCDDataset(IterableDataset[Batch]):
    """An endless, restartable stream of batches.

    Batch i holds the sequences i * batch_size ... (i + 1) * batch_size - 1 of the split, whatever was drawn before.

    Args:
        config: the generator.
        seed: of the data.
        split: "train", "validation" or "test".
        batch_size: sequences a batch.
        start: index of the first sequence.

    Raises:
        ValueError: when there is no such split, seed, batch size or start.
    """

    def __init__(self, config: SRCDConfig, *, seed: int, split: Split, batch_size: int, start: int = 0) -> None:
        super().__init__()
        check_stream(split, seed=seed, start=start, batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        self.config, self.seed, self.batch_size, self.start = config, seed, batch_size, start
        self.split: Split = split

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches for ever."""
        worker = get_worker_info()  # workers of a DataLoader take turns
        index = self.start + (worker.id * self.batch_size if worker else 0)
        while True:
            yield self.batch(index)
            index += self.batch_size * (worker.num_workers if worker else 1)

    def batch(self, index: int) -> Batch:
        """The batch whose first sequence is number `index` of the split."""
        samples = [
            sample(self.config, seed=self.seed, split=self.split, index=i)
            for i in range(index, index + self.batch_size)
        ]
        return collate(self.config, samples)


def collate(config: SRCDConfig, samples: list[dict[str, np.ndarray]]) -> Batch:
    """Stacks sequences from `sample` into a `Batch`; also how exported arrays become one again.

    Raises:
        ValueError: when there is none, one lacks an array, or lengths or key dimensions differ from the config's.
    """
    if not samples:
        raise ValueError("samples = [] makes no batch; give at least one sequence")
    for i, one in enumerate(samples):
        for name in _ARRAYS:
            shape = (config.seq_len, config.key_dim) if name == "key" else (config.seq_len,)
            if name not in one or np.shape(one[name]) != shape:
                found = f"has shape {np.shape(one[name])}" if name in one else "is not there"
                raise ValueError(f'samples[{i}]["{name}"] {found}; the config gives {shape}')

    def stack(name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.stack([s[name] for s in samples])).to(dtype)

    kind, value = stack("kind", torch.int64), stack("value", torch.int64)
    level = stack("level", torch.float32)
    if config.key_mode == "token":
        no_key = config.n_patterns + config.n_novel_keys
        key_id = stack("key_id", torch.int64)
        discrete = torch.stack([kind, value, torch.where(key_id < 0, no_key, key_id)], dim=-1)
        continuous = level[..., None]
    else:
        discrete = torch.stack([kind, value], dim=-1)
        continuous = torch.cat([level[..., None], stack("key", torch.float32)], dim=-1)
    answer = stack("answer", torch.int64)
    recurring, novel, rebound = (stack(name, torch.bool) for name in ("recurring", "novel", "rebound"))
    everywhere = torch.ones_like(novel)
    return Batch(
        discrete=discrete,
        continuous=continuous,
        gaps=stack("gap", torch.float32),
        horizons=stack("horizon", torch.float32),
        valid=everywhere,
        dynamics_target=stack("next_level", torch.float32),
        dynamics_mask=everywhere,
        retrieval_target=answer.clamp(min=0),
        retrieval_mask=answer >= 0,
        slices={"recurring": recurring & ~rebound, "novel": novel, "rebound": rebound},
        oracle_reads=novel | rebound,
        pattern=stack("pattern", torch.int64),
    )
