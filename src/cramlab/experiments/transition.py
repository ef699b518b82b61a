"""Attention over training with frequent validations: is its fall a sharp transition, and what triggers it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from cramlab.config import ConfigError
from cramlab.experiments.srcd import run_config
from cramlab.experiments.study import Study
from cramlab.training.run import RunConfig, Stage

SEQ_LEN = 64  # in-context retrieval is learned within 300 steps, which makes many seeds and routers affordable
MAX_STEPS = {"tiny": 60, "small": 1200}


class Point(NamedTuple):
    """One point: a mixer, the share of recurring queries, and whether training starts with an encoding phase."""

    mixer: str
    recurring_frac: float = 0.7
    encoding: bool = True


POINTS = (
    Point("cram"),
    Point("cram", encoding=False),
    Point("cram-gumbel"),
    Point("cram-gumbel", encoding=False),
    Point("cram-paper"),
    Point("cram-paper", encoding=False),
    Point("cram", recurring_frac=0.25),
    Point("cram", recurring_frac=0.9),
    Point("price-only"),
    Point("cram-fast-semantic"),
)
N_SEEDS = 3


def transition(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Attention over training by router, recurrence and with the encoding phase on and off, at 64 tokens."""
    if size not in MAX_STEPS:
        raise ConfigError(f'transition has no runs at size "{size}"; give --size {" or ".join(MAX_STEPS)}')
    points = [point for point in POINTS if mixers is None or point.mixer in mixers]
    if not points:
        raise ConfigError(f"transition has no runs of {', '.join(mixers or ())}; see experiments/transition.py")
    yield [transition_config(point, size, s) for s in (range(N_SEEDS) if seed is None else (seed,)) for point in points]


def transition_config(point: Point, size: str, seed: int) -> RunConfig:
    """A run with a fixed number of steps, validated every 10 steps."""
    config = run_config(mixer=point.mixer, size=size, seed=seed, experiment="transition")
    training = config.training
    training = dataclasses.replace(
        training,
        stages=(Stage(batch_size=64 if size == "small" else 16),),
        max_steps=MAX_STEPS[size],
        eval_every_steps=10,
        patience_evals=MAX_STEPS[size],  # never reached: all runs have the same length
        n_validation_tokens=min(training.n_validation_tokens, 8192),
        encoding_target=training.encoding_target if point.encoding else 0.0,
    )
    task = dataclasses.replace(config.task, seq_len=SEQ_LEN, recurring_frac=point.recurring_frac)
    variant = f"recurring_frac={point.recurring_frac:g}" + ("" if point.encoding else "-no_encoding")
    return dataclasses.replace(config, task=task, training=training, variant=variant)
