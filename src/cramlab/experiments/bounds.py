"""Static routers and CRAM against the lower bound of docs/theory.md, with and without its assumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from cramlab.config import ConfigError
from cramlab.experiments.study import Study
from cramlab.experiments.transition import Point, transition_config
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.training.run import RunConfig


class BoundPoint(NamedTuple):
    """A router on one variant of the task.

    Attributes:
        mixer: name of the mixer.
        query_frac: share of tokens that are queries.
        rebound: every key has another value in each sequence, so that nothing can be memorised.
        random_frac: share of tokens that a random router reads; None: the router is not random.
    """

    mixer: str
    query_frac: float = 0.05
    rebound: bool = False
    random_frac: float | None = None


# CRAM and `price-only` on unchanged SRCD are points of `transition`.
POINTS = (
    BoundPoint("cram", rebound=True),
    BoundPoint("cram-random", rebound=True, random_frac=0.5),
    BoundPoint("transformer", rebound=True),
    BoundPoint("cram-random", random_frac=0.5),
    BoundPoint("recurrence"),
    BoundPoint("recurrence", rebound=True),
    BoundPoint("cram", query_frac=0.1),
    BoundPoint("cram", query_frac=0.1, rebound=True),
    BoundPoint("cram-random", rebound=True, random_frac=0.2),
)
STEPS = {"tiny": 60, "small": 900}


def bounds(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Static routers and CRAM against the lower bound, with and without its assumption, at 64 tokens."""
    if size not in STEPS:
        raise ConfigError(f'bounds has no runs at size "{size}"; give --size {" or ".join(STEPS)}')
    points = [point for point in POINTS if mixers is None or point.mixer in mixers]
    if not points:
        raise ConfigError(f"bounds has no runs of {', '.join(mixers or ())}; see experiments/bounds.py")
    yield [bound_config(point, size, seed or 0) for point in points]


def bound_config(point: BoundPoint, size: str, seed: int) -> RunConfig:
    """The run of a point, with a fixed number of steps."""
    config = transition_config(Point(point.mixer), size, seed)
    task = dataclasses.replace(
        config.task,
        query_frac=point.query_frac,
        write_frac=2 * point.query_frac,
        rebind_frac=1.0 if point.rebound else 0.0,
    )
    model, variant = config.model, f"f={point.query_frac:g}"
    if point.rebound:
        variant += "-rebound"
    if point.random_frac is not None:
        router = RouterConfig(name="random", random_frac=point.random_frac)
        model = dataclasses.replace(model, mixer=CRAMConfig(router=router))
        variant += f"-reads={point.random_frac:g}"
    training = dataclasses.replace(config.training, max_steps=STEPS[size], eval_every_steps=20)
    return dataclasses.replace(config, experiment="bounds", task=task, model=model, training=training, variant=variant)
