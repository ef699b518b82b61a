"""The config of one training run: the task, the model and the training."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from cramlab.config import (
    ConfigError,
    Count,
    CountOrZero,
    Name,
    Positive,
    Seed,
    Share,
    Size,
    Threads,
    Weight,
    checked,
)
from cramlab.model import ModelConfig
from cramlab.objective import LossConfig
from cramlab.tasks.task import Task

Accelerator = Literal["cpu", "cuda", "mps", "auto"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"]
Devices = Annotated[int, Field(ge=1, le=64)]
_Tokens = Annotated[int, Field(ge=1, le=2**30)]
_TokensOrZero = Annotated[int, Field(ge=0, le=2**30)]
SeqLen = Annotated[int, Field(ge=2, le=2**20)]


@checked("training.stages[]")
class Stage:
    """One stage of the length curriculum.

    Attributes:
        seq_len: tokens per sequence; None: the task's own length.
        batch_size: sequences per optimiser step.
        max_steps: largest number of steps in this stage; the last stage takes all steps that are left.
        until: validation retrieval accuracy at which the next stage begins, once the encoding phase is over; None: the
            next stage begins after `max_steps`.
    """

    seq_len: SeqLen | None = None
    batch_size: Size = 16
    max_steps: Count = 1000
    until: Share | None = None


@checked("training")
class TrainingConfig:
    """How a model is trained; the same for every mixer.

    After warm-up the learning rate is constant until validation stops improving in the last stage, or until
    `cooldown_steps` before `max_steps`; then it falls linearly to zero.

    Attributes:
        stages: the length curriculum, shortest sequences first.
        max_steps: largest number of optimiser steps.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup_steps: steps from zero to the full learning rate.
        average_decay: decay of the exponential average of the weights, which validation and test use. With 0.99 it
            spans about 100 steps; with 0 it is the newest weights.
        cooldown_steps: steps from the full learning rate to zero.
        grad_clip: largest norm of the gradient.
        eval_every_steps: steps between two validations.
        patience_evals: validations in the last stage without an improvement after which the cool-down begins.
        n_validation_tokens: tokens per validation at any length; at least one sequence.
        n_test_tokens: tokens of the single evaluation on the test split; 0: there is none, as in tuning.
        test_seq_lens: further sequence lengths for that evaluation, in tokens; patterns and dynamics stay the same.
        encoding_target: validation retrieval accuracy at which the encoding phase (every token reads, reads are free)
            ends; 0: there is no encoding phase.
        audit_frac: share of the tokens of a training batch that read whatever the router decides.
        audit_supervised_frac: the same share among tokens with a retrieval target.
        temperature: temperature of the Gumbel router in training.
        semantic_rate: factor on the learning rate of the semantic memory.
        price_ramp_steps: steps over which the prices of Eq. 8 rise after the encoding phase.
        loss: weights and prices of the objective.
        log_every_steps: steps between two rows of the record's series.
        n_threads: CPU threads of each process.
        devices: number of devices of this machine, one process each, that share every batch; results are those of one
            device to rounding.
        accelerator: accelerator of Lightning Fabric.
        precision: precision of Lightning Fabric.
    """

    stages: tuple[Stage, ...] = (Stage(),)
    max_steps: Count = 1000
    learning_rate: Positive = 2e-3
    weight_decay: Weight = 0.01
    warmup_steps: CountOrZero = 50
    average_decay: Share = 0.99
    cooldown_steps: CountOrZero = 200
    grad_clip: Positive = 1.0
    eval_every_steps: Count = 50
    patience_evals: Count = 6
    n_validation_tokens: _Tokens = 16_384
    n_test_tokens: _TokensOrZero = 65_536
    test_seq_lens: tuple[SeqLen, ...] = ()
    encoding_target: Share = 0.95
    audit_frac: Share = 0.05
    audit_supervised_frac: Share = 1.0
    temperature: Positive = 1.0
    semantic_rate: Positive = 1.0
    price_ramp_steps: CountOrZero = 200
    loss: LossConfig = field(default_factory=LossConfig)
    log_every_steps: Count = 10
    n_threads: Threads = 1
    devices: Devices = 1
    accelerator: Accelerator = "cpu"
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not self.stages:
            raise ConfigError("training.stages is empty; give at least one Stage()")
        if len(set(self.test_seq_lens)) < len(self.test_seq_lens):
            raise ConfigError(f"training.test_seq_lens = {self.test_seq_lens} holds a length twice; give each once")
        for i, stage in enumerate(self.stages):
            if stage.batch_size % self.devices:
                raise ConfigError(
                    f"training.devices = {self.devices} must divide training.stages[{i}].batch_size = "
                    f"{stage.batch_size}; give {_largest_divisor(stage.batch_size, self.devices)}"
                )


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


@checked("")
class RunConfig:
    """One run: everything that its result depends on, except code and hardware.

    Attributes:
        experiment: name of the experiment.
        size: name of the task's size.
        mixer: name in `experiments.variants`.
        variant: part of the run's name that distinguishes runs of the same experiment, mixer and seed.
        seed: seed of the data, the initial weights and every random choice in training.
        task: config of the task, of this library or of one's own; see `cramlab.tasks.task.Task`.
        model: config of the model.
        training: config of the training.
    """

    experiment: Name
    size: Name
    mixer: Name
    seed: Seed
    task: Task
    model: ModelConfig
    training: TrainingConfig
    variant: Name = ""

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        lengths = {f"training.stages[{i}].seq_len": stage.seq_len for i, stage in enumerate(self.training.stages)}
        lengths |= {f"training.test_seq_lens[{i}]": n for i, n in enumerate(self.training.test_seq_lens)}
        for path, seq_len in lengths.items():
            try:
                self.task_with(seq_len)
            except ConfigError as error:
                raise ConfigError(f"{path} = {seq_len} is not a valid length for the task: {error}") from error

    @property
    def name(self) -> str:
        """Name of the run's folder, `MIXER-seedN` or `MIXER-VARIANT-seedN`."""
        return "-".join(part for part in (self.mixer, self.variant, f"seed{self.seed}") if part)

    @property
    def after(self) -> str:
        """Name of the run in the same folder that must finish before this one begins; empty: none."""
        return ""

    def task_at(self, stage: Stage) -> Task:
        """The task at the stage's length."""
        return self.task_with(stage.seq_len)

    def task_with(self, seq_len: int | None) -> Task:
        """The task at another length; None: its own length."""
        return self.task if seq_len is None else dataclasses.replace(self.task, **{"seq_len": seq_len})
