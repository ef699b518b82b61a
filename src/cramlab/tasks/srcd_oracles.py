"""Reference scores on SRCD without learning: the oracle is the best possible, floors use no attention to keys.

All predict from a batch's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.batch import Batch, Predictions
from cramlab.tasks.srcd import QUERY, WRITE, SRCDConfig, patterns

FloorName = Literal["majority", "last_value", "memoriser"]


def oracle(config: SRCDConfig, batch: Batch) -> Predictions:
    """Predicts as well as possible: looks every queried key up among the earlier writes and knows the level's dynamics.

    Raises:
        ValueError: when the batch's channels differ from those of the config.
    """
    _check_channels(config, batch)
    write = batch.discrete[..., 0] == WRITE
    earlier = torch.ones(batch.gaps.shape[1], batch.gaps.shape[1], dtype=torch.bool).tril(-1)
    candidates = write[:, None] & earlier  # (B, T, T): a row's query may use a column's write
    if config.key_mode == "token":
        key = batch.discrete[..., 2]
        distance = (key[:, :, None] != key[:, None, :]).float()
    else:
        key = batch.continuous[..., 1:]
        distance = torch.cdist(key, key)
    nearest = torch.where(candidates, distance, torch.inf).argmin(dim=-1)
    value = batch.discrete[..., 1].gather(1, nearest)
    return _predictions(config, batch, value)


def floor(name: FloorName, config: SRCDConfig, batch: Batch, *, seed: int) -> Predictions:
    """Predicts without looking back for the queried key.

    Args:
        name: "majority" always answers the value that most patterns share; "last_value" repeats the newest write;
            "memoriser" knows every recurring pattern and answers the majority value for all other keys.
        config: parameters of the generator.
        batch: a batch of the same generator.
        seed: seed of the run, which draws the patterns.

    Raises:
        ValueError: when the name is unknown, or the batch's channels differ from those of the config.
    """
    _check_channels(config, batch)
    predictors: dict[FloorName, Callable[[SRCDConfig, Batch, int], Tensor]] = {
        "majority": _majority,
        "last_value": _last_value,
        "memoriser": _memoriser,
    }
    if name not in predictors:
        raise ValueError(f'floor "{name}" is unknown; give one of {", ".join(predictors)}')
    return _predictions(config, batch, predictors[name](config, batch, seed))


def _check_channels(config: SRCDConfig, batch: Batch) -> None:
    spec = config.input_spec
    wanted = len(spec.vocab_sizes), spec.n_continuous
    if (held := (batch.discrete.shape[-1], batch.continuous.shape[-1])) != wanted:
        raise ValueError(
            f"the batch has {held[0]} discrete and {held[1]} continuous channels, but the config makes "
            f"{wanted[0]} and {wanted[1]}; give the config that made the batch"
        )


def _majority_value(config: SRCDConfig, seed: int) -> int:
    return int(np.bincount(patterns(config, seed).values, minlength=config.n_values).argmax())


def _majority(config: SRCDConfig, batch: Batch, seed: int) -> Tensor:
    return torch.full_like(batch.retrieval_target, _majority_value(config, seed))


def _last_value(config: SRCDConfig, batch: Batch, seed: int) -> Tensor:
    positions = torch.arange(batch.gaps.shape[1]).expand_as(batch.retrieval_target)
    newest = torch.where(batch.discrete[..., 0] == WRITE, positions, -1).cummax(dim=1).values
    written = batch.discrete[..., 1].gather(1, newest.clamp(min=0))
    return torch.where(newest < 0, _majority_value(config, seed), written)


def _memoriser(config: SRCDConfig, batch: Batch, seed: int) -> Tensor:
    known = patterns(config, seed)
    values = torch.from_numpy(known.values)
    if config.key_mode == "token":
        key = batch.discrete[..., 2]
        familiar, which = key < config.n_patterns, key.clamp(max=config.n_patterns - 1)
    else:
        distance = torch.cdist(batch.continuous[..., 1:].double(), torch.from_numpy(known.keys)[None])
        nearest, which = distance.min(dim=-1)
        # Two noisy observations of a key differ by sqrt(2 key_dim) key_noise on average; 3 leaves room for the tail.
        familiar = nearest < 3 * config.key_noise * config.key_dim**0.5 + 1e-6
    return torch.where(familiar & (batch.discrete[..., 0] == QUERY), values[which], _majority_value(config, seed))


def memoriser_acc(config: SRCDConfig) -> float:
    """Returns the expected accuracy of "memoriser" with uniform values: the recurring share, and chance on the rest."""
    known = config.recurring_frac * (1 - config.rebind_frac)
    novel = 1 - config.recurring_frac
    return known + novel / config.n_values


def chance_acc(config: SRCDConfig) -> float:
    """Returns the accuracy of a uniform guess."""
    return 1 / config.n_values


def _predictions(config: SRCDConfig, batch: Batch, value: Tensor) -> Predictions:
    drive = config.beta * torch.sin(config.omega * batch.horizons)
    logits = F.one_hot(value.clamp(max=config.n_values - 1), config.n_values).float()
    return Predictions(level=config.decay * batch.continuous[..., 0] + drive, logits=logits)
