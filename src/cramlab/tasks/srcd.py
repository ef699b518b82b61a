"""SRCD, Sparse Retrieval in Continuous Dynamics (paper sec. 6), version 1.

One short sequence (N = 12; `.` means that the field is empty)::

    position   0     1     2     3     4     5     6     7     8     9     10    11
    gap        1.0   2.3   1.1   1.4   7.9   1.2   1.0   3.1   1.6   1.1   2.2   1.3
    level      4.1   4.2   4.4   4.5   4.7   4.4   4.6   4.7   4.9   5.1   5.0   5.2
    kind       flow  write flow  write flow  query flow  write flow  flow  query flow
    key        .     k7    .     n1    .     k7    .     n2    .     .     n1    .
    value      .     31    .     8     .     .     .     55    .     .     .     .
    answer     .     .     .     .     .     31    .     .     .     .     8     .
    next level 4.2   4.4   4.5   4.7   4.4   4.6   4.7   4.9   5.1   5.0   5.2   5.3

`k7` is a recurring pattern: it has the value 31 in every sequence, so a parametric memory can learn the answer.
`n1` was drawn for this sequence alone, so only attention to earlier tokens can answer it. `n2` is never queried.
Every queried key, recurring or novel, is written exactly once in its sequence, before its single query. Position and
distance follow the same distribution for both: recurring and novel keys differ only in other sequences.

The level follows `v[t] = 0.95 v[t-1] + beta sin(omega gap[t]) + noise`; gaps follow Pareto(1.5). The horizon (the gap
to the next event) is an input, so the lowest possible mean squared error is the variance of the noise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cramlab.batch import Batch, InputSpec
from cramlab.config import ConfigError, Share, Size, checked
from cramlab.tasks.task import SPLITS, BatchStream, Split, check_stream

VERSION = 1
FLOW, WRITE, QUERY = 0, 1, 2
_PATTERN_STREAM = 101  # spawn key of the generator that draws the recurring patterns; the splits use 0, 1 and 2
_ARRAYS = (
    "kind", "value", "key_id", "key", "gap", "horizon", "level", "next_level", "answer", "recurring", "novel",
    "rebound", "pattern",
)  # fmt: skip
_Scale = Annotated[float, Field(ge=0, le=1e6)]
_SPLIT_SHARES = (6, 1, 1)  # proportions in which the splits divide the (key, value) pairs of novel token keys


@checked("task")
class SRCDConfig:
    """Parameters of the generator. "(paper)" marks what the paper fixes; the other values are ours, with the reason.

    Attributes:
        seq_len: tokens per sequence, N (paper: 2048).
        query_frac: share of tokens that query an earlier binding (paper: 0.05).
        recurring_frac: probability that a queried binding is a recurring pattern (paper: 0.7).
        n_patterns: number of recurring patterns (paper: 100).
        write_frac: share of tokens that write a binding. At twice `query_frac`, every second binding is never
            queried, so a model cannot answer by elimination, and the bindings still take only a tenth of the
            sequence. Bindings that are never queried are always novel, as 100 patterns would not suffice.
        rebind_frac: probability that a recurring key has another value in this sequence. 0 in the paper; above 0,
            a model that always trusts its parametric memory fails.
        key_mode: "vector": a key is a unit vector with noise, so a model must judge whether it is familiar.
            "token": a key is an id, so a model can look up whether it is familiar.
        key_dim: dimensions of a vector key. At 16, a few hundred keys stay well separated (nearest about 45 degrees).
        key_noise: standard deviation of the noise on each coordinate of a vector key, drawn separately for write and
            query. 0.02 is small against the distance between keys, so the oracle stays exact.
        n_novel_keys: number of ids for novel token keys. 1024 is ten times the patterns: each id occurs often enough
            to be embedded and with too many values to be memorised. Each pair of novel id and value belongs to one
            split: six eighths to train, one eighth each to validation and test. Known shortcut: a model that knows
            this rule (ours, `_split_of_binding`) guesses novel test values at 8 in 64 instead of 1 in 64.
        n_values: number of values. At 64, chance is 1.6%, far from every figure of interest.
        decay: factor of the previous level (paper: 0.95); at most 0.9999, as the burn-in before a sequence lasts
            until the level has forgotten its start.
        beta: amplitude of the drive. At 0.5, a model that knows only the mean of the drive has almost three times
            the lowest error.
        omega: angular frequency of the drive, in radians per time unit. At 0.3, 99% of the gaps lie within one
            period and 99.9% within five, so a smooth function approximator can reach the noise floor.
        gap_shape: shape of the Pareto distribution of gaps, whose minimum is 1 (paper: 1.5; the scale is ours). At
            least 0.5, as smaller shapes give gaps beyond the range of float32.
        noise_std: standard deviation of the level's noise. At 0.1, the lowest mean squared error is 0.01.
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
        """Raises ConfigError for combinations of fields that cannot be generated."""
        if self.key_mode == "token" and self.n_values < 2 * sum(_SPLIT_SHARES):
            raise ConfigError(
                f"task.n_values = {self.n_values} is too few to divide bindings among the splits; "
                f"give at least {2 * sum(_SPLIT_SHARES)}"
            )
        if self.write_frac < self.query_frac:
            raise ConfigError(
                f"task.write_frac = {self.write_frac} is below task.query_frac = {self.query_frac}, but every query "
                "needs its own binding; raise write_frac"
            )
        if self.write_frac + self.query_frac > 1:
            raise ConfigError(
                f"task.write_frac + task.query_frac = {self.write_frac + self.query_frac} exceeds 1; lower one"
            )
        mean = self.recurring_frac * self.query_frac * self.seq_len
        most = math.ceil(mean + 4 * math.sqrt(mean * (1 - self.recurring_frac)))  # 4 standard deviations above the mean
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
        """Discrete channels: kind, value (and key id); continuous channels: level (and key vector)."""
        if self.key_mode == "token":
            n_keys = self.n_patterns + self.n_novel_keys + 1
            return InputSpec(vocab_sizes=(3, self.n_values + 1, n_keys), n_continuous=1, n_classes=self.n_values)
        return InputSpec(vocab_sizes=(3, self.n_values + 1), n_continuous=1 + self.key_dim, n_classes=self.n_values)

    @property
    def dynamics_floor(self) -> float:
        """Lowest possible mean squared error of the next level: the variance of its noise."""
        return self.noise_std**2

    @property
    def expected_attention_frac(self) -> float:
        """Expected share of tokens that query a value which no earlier sequence can have taught."""
        return self.query_frac * (1 - self.recurring_frac * (1 - self.rebind_frac))

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices of a split as one batch."""
        return collate(self, [sample(self, seed=seed, split=split, index=i) for i in indices])

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> BatchStream:
        """Returns an endless stream of batches; `BatchStream` describes the arguments."""
        return BatchStream(self, seed=seed, split=split, batch_size=batch_size, start=start)


TINY = SRCDConfig(seq_len=64, n_patterns=16)
QUICK = SRCDConfig(seq_len=64, n_patterns=32, n_values=16, query_frac=0.1, write_frac=0.2)  # little to learn
SMALL = SRCDConfig(seq_len=256)
MEDIUM = SRCDConfig(seq_len=512)
PAPER = SRCDConfig(seq_len=2048)
SIZES: dict[str, SRCDConfig] = {"tiny": TINY, "quick": QUICK, "small": SMALL, "medium": MEDIUM, "paper": PAPER}


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """The recurring bindings of one seed.

    Attributes:
        keys: unit vectors (n_patterns, key_dim).
        values: integers (n_patterns,).
    """

    keys: np.ndarray
    values: np.ndarray


@functools.lru_cache(maxsize=16)
def _patterns(n_patterns: int, key_dim: int, n_values: int, seed: int) -> Patterns:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PATTERN_STREAM,)))
    keys = _unit_rows(rng.standard_normal((n_patterns, key_dim)))
    return Patterns(keys=keys, values=rng.integers(n_values, size=n_patterns))


def patterns(config: SRCDConfig, seed: int) -> Patterns:
    """Returns the recurring bindings of a seed. They do not depend on seq_len, so training can mix lengths."""
    return _patterns(config.n_patterns, config.key_dim, config.n_values, seed)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _split_of_binding(key_ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the split that each novel (key id, value) pair belongs to; no two splits share a pair."""
    colour = (key_ids * 5 + values) % sum(_SPLIT_SHARES)
    return np.searchsorted(np.cumsum(_SPLIT_SHARES), colour, side="right")


def _novel_values(config: SRCDConfig, rng: np.random.Generator, key_ids: np.ndarray, split: int) -> np.ndarray:
    """Draws a value for each novel key; for token keys, only values that belong to the split with that key."""
    values = rng.integers(config.n_values, size=len(key_ids))
    if config.key_mode == "token":
        while (wrong := _split_of_binding(key_ids, values) != split).any():
            values[wrong] = rng.integers(config.n_values, size=int(wrong.sum()))
    return values


def _stochastic_round(rng: np.random.Generator, x: float) -> int:
    """Draws one of the two integers around x with mean x, so that short sequences keep the stated shares."""
    return math.floor(x) + int(rng.random() < x - math.floor(x))


def sample(config: SRCDConfig, *, seed: int, split: Split, index: int) -> dict[str, np.ndarray]:
    """Draws one sequence as named arrays. It depends on the arguments alone, not on any global random state.

    Args:
        config: parameters of the generator.
        seed: seed of the run, which also draws the recurring patterns.
        split: "train", "validation" or "test".
        index: index of the sequence in the split, from 0.

    Returns:
        Arrays of length N: `kind`, `value`, `key_id` (-1: none), `key` (N, key_dim), `gap`, `horizon`, `level`,
        `next_level`, `answer` (-1: none), `recurring`, `novel`, `rebound` (bool), `write_position`, `pattern`
        (-1: none).

    Raises:
        ValueError: when the split is unknown, or seed or index is negative or not a whole number.
    """
    check_stream(split, seed=seed, index=index)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))
    n = config.seq_len
    n_queries = min(_stochastic_round(rng, config.query_frac * n), n // 2)
    n_writes = min(max(n_queries, _stochastic_round(rng, config.write_frac * n)), n - n_queries)
    n_recurring = min(int(rng.binomial(n_queries, config.recurring_frac)), config.n_patterns)

    # Bindings 0 to n_recurring - 1 are patterns, those up to n_queries - 1 novel and queried, the rest only novel.
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

    # Each queried binding takes two positions, the earlier for its write; every other binding takes one.
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
    """Places writes and queries at their positions in arrays of length n."""
    n_queries = len(query_at)
    kind = np.full(n, FLOW)
    value = np.full(n, config.n_values)  # the id n_values means "no value"
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
    """Draws gaps and levels. A burn-in before position 0 makes the level independent of its start."""
    from scipy.signal import lfilter  # imported here so that `import cramlab` works without scipy

    burn_in = math.ceil(math.log(1e-3) / math.log(config.decay)) if 0 < config.decay < 1 else 0
    gap = 1.0 + rng.pareto(config.gap_shape, size=burn_in + n + 1)
    drive = config.beta * np.sin(config.omega * gap) + config.noise_std * rng.standard_normal(len(gap))
    level = np.asarray(lfilter([1.0], [1.0, -config.decay], drive))
    gap, level = gap[burn_in:], level[burn_in:]
    return {"gap": gap[:n], "horizon": gap[1:], "level": level[:n], "next_level": level[1:]}


def collate(config: SRCDConfig, samples: list[dict[str, np.ndarray]]) -> Batch:
    """Stacks sequences, drawn by `sample` or read from an export, into a `Batch`.

    Raises:
        ValueError: when `samples` is empty, an array is missing, or a shape differs from the config's.
    """
    if not samples:
        raise ValueError("samples is empty; give at least one sequence")
    for i, one in enumerate(samples):
        for name in _ARRAYS:
            shape = (config.seq_len, config.key_dim) if name == "key" else (config.seq_len,)
            if name not in one or np.shape(one[name]) != shape:
                problem = f"has shape {np.shape(one[name])}" if name in one else "is missing"
                raise ValueError(f'samples[{i}]["{name}"] {problem}; the config requires shape {shape}')

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
