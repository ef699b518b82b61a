"""The run of a mixer on a task of one's own: one length, and no assumption about how much is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cramlab.experiments.srcd import TRAINING
from cramlab.experiments.study import Study
from cramlab.experiments.variants import model_of, short_name
from cramlab.extensions import label, load_class
from cramlab.objective import LossConfig
from cramlab.tasks.check import check_task
from cramlab.tasks.task import Task
from cramlab.training.run import RunConfig, Stage, TrainingConfig

_TOKENS_A_STEP = {"tiny": 1024, "quick": 2048, "small": 4096, "medium": 8192, "paper": 8192}


def own_training(task: Task, size: str) -> TrainingConfig:
    """The training of a size for a task: that of SRCD with the task's own length, every answer counting once.

    SRCD's factor of ten on missed queries suits a task that asks at one token in twenty.
    """
    training = TRAINING[size]
    batch_size = max(1, _TOKENS_A_STEP[size] // task.seq_len)
    return dataclasses.replace(
        training,
        stages=(Stage(batch_size=batch_size),),
        loss=LossConfig(retrieval_emphasis=1.0, benefit_cap=5.0),
    )


def own_study(*, task: str, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Mixers on a task of one's own, side by side.

    Args:
        task: reference of the task, `FILE.py:CLASS` or `MODULE:CLASS`.
        size: name of a training: "tiny", "quick", "small", "medium" or "paper".
        seed: seed of data, weights and sampling; None: 0.
        mixers: names or references; None: CRAM and the full-attention control.

    Raises:
        ConfigError: when a class cannot be loaded, or the task breaks its contract.
    """
    made, runs = load_class(task)(), []
    check_task(made, seed=seed or 0)
    for mixer in mixers or ("cram", "transformer"):
        model, training = model_of(mixer, own_training(made, size))
        runs.append(
            RunConfig(
                experiment=label(task),
                size=size,
                mixer=short_name(mixer),
                seed=seed or 0,
                task=made,
                model=model,
                training=training,
            )
        )
    yield runs
