"""How CRAM's attention follows what the task needs: recurrence, patterns, rebinding and kinds of key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cramlab.config import ConfigError
from cramlab.experiments.srcd import run_config
from cramlab.experiments.study import Study
from cramlab.memory import AdapterConfig, CRAMConfig
from cramlab.training.run import RunConfig

N_SEEDS = 2
SIZES = ("tiny", "small")  # longer sequences need more patterns than some points have
# 10 patterns would be too few: a sequence of the small task queries up to 17 different ones.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "recurring_frac": (0.0, 0.25, 0.5, 0.7, 0.9, 1.0),
    "n_patterns": (20, 1000),
    "rebind_frac": (0.05, 0.2),
    "key_mode": ("token",),
}


def srcd_sweeps(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """CRAM over recurrence, number of patterns, rebinding and kind of key, two seeds each."""
    if size not in SIZES:
        raise ConfigError(f'srcd_sweeps has no runs at size "{size}"; give --size {" or ".join(SIZES)}')
    seeds = range(N_SEEDS) if seed is None else (seed,)
    yield [
        sweep_config(mixer, size, s, name, value)
        for mixer in mixers or ("cram",)
        for name, values in SWEEPS.items()
        for value in values
        for s in seeds
    ]


def sweep_config(mixer: str, size: str, seed: int, name: str, value: Any) -> RunConfig:
    """The run of a mixer on the task with one field changed."""
    config = run_config(mixer=mixer, size=size, seed=seed, experiment="srcd_sweeps")
    task = dataclasses.replace(config.task, **{name: value})
    if mixer == "cram" and name == "n_patterns" and value > 200:  # one adapter unit per pattern
        semantic = AdapterConfig(rank=value)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, mixer=CRAMConfig(semantic=semantic))
        )
    training = config.training
    if size != "tiny":
        training = dataclasses.replace(training, max_steps=5000, patience_evals=24, cooldown_steps=400)
    return dataclasses.replace(config, task=task, training=training, variant=f"{name}={value}")
