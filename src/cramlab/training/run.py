"""What one training run is: task, model, and how it is trained."""

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
from cramlab.tasks.srcd import SRCDConfig

Accelerator = Literal["cpu", "cuda", "mps", "auto"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"]
_Tokens = Annotated[int, Field(ge=1, le=2**30)]
_TokensOrZero = Annotated[int, Field(ge=0, le=2**30)]
SeqLen = Annotated[int, Field(ge=2, le=2**20)]


@checked("training.stages[]")
class Stage:
    """One length of the curriculum.

    Attributes:
        seq_len: tokens a sequence; None: the task's own length.
        batch_size: sequences an optimiser step.
        max_steps: steps spent here at most; the last stage takes whatever is left.
        until: validation retrieval at which the next stage begins; None: after `max_steps` only. A router must also
            have left its encoding phase.
    """

    seq_len: SeqLen | None = None
    batch_size: Size = 16
    max_steps: Count = 1000
    until: Share | None = None


@checked("training")
class TrainingConfig:
    """How a model is trained; the same for every mixer.

    The rate is constant after warm-up until validation stops improving in the last stage (or `max_steps` nears), then
    falls linearly to zero over `cooldown_steps`.

    Attributes:
        stages: the length curriculum, short first.
        max_steps: optimiser steps in all, at most.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: steps from zero to the full rate.
        average_decay: of the exponential average of the weights that validation and test look at. 0.99: a memory
            of about a hundred steps. 0: the newest weights themselves.
        cooldown_steps: steps from the full rate to zero.
        grad_clip: largest norm of the gradient.
        eval_every_steps: steps between two validations.
        patience_evals: validations in the last stage without a new best, after which the rate cools down.
        n_validation_tokens: tokens of each validation, whatever the length; at least one sequence.
        n_test_tokens: tokens of the one look at the test split; 0: it is not looked at, as in tuning.
        test_seq_lens: further lengths at which that look is taken, tokens; patterns and laws stay the same.
        encoding_target: validation retrieval at which the encoding phase (all tokens read, no price) ends; 0: there
            is no such phase.
        audit_frac: share of the tokens of a training batch that read whatever the router says.
        audit_supervised_frac: the same among tokens with a retrieval target.
        temperature: of the Gumbel router while training.
        semantic_rate: factor on the learning rate of the semantic memory.
        price_ramp_steps: steps over which the prices of Eq. 8 rise after the encoding phase.
        loss: weights and prices.
        log_every_steps: steps between two rows of the record's series.
        n_threads: CPU threads.
        accelerator: of Lightning Fabric.
        precision: of Lightning Fabric.
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
    accelerator: Accelerator = "cpu"
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not self.stages:
            raise ConfigError("training.stages is empty; give at least one Stage()")
        if len(set(self.test_seq_lens)) < len(self.test_seq_lens):
            raise ConfigError(f"training.test_seq_lens = {self.test_seq_lens} holds a length twice; give each once")


@checked("")
class RunConfig:
    """One run: everything that its result depends on, besides code and hardware.

    Attributes:
        experiment: name in the catalog.
        size: name of the task's size.
        mixer: name in the catalog.
        variant: what sets this run apart from others of the same mixer and seed in its experiment, for its name.
        seed: of data, initial weights and every random choice in training.
        task: the task.
        model: the model.
        training: how.
    """

    experiment: Name
    size: Name
    mixer: Name
    seed: Seed
    task: SRCDConfig
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
                raise ConfigError(f"{path} = {seq_len} is no length for the task: {error}") from error

    @property
    def name(self) -> str:
        """`MIXER-seedN` or `MIXER-VARIANT-seedN`: folder of the run and stem of its record."""
        return "-".join(part for part in (self.mixer, self.variant, f"seed{self.seed}") if part)

    @property
    def after(self) -> str:
        """Name of the run beside this one that has to be finished before it can begin; empty: none."""
        return ""

    def task_at(self, stage: Stage) -> SRCDConfig:
        """The task at the stage's length."""
        return self.task_with(stage.seq_len)

    def task_with(self, seq_len: int | None) -> SRCDConfig:
        """The task at another length; None: at its own."""
        return self.task if seq_len is None else dataclasses.replace(self.task, seq_len=seq_len)
