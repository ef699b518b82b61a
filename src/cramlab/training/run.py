"""What one training run is: task, model, and how it is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from cramlab.losses import LossConfig
from cramlab.model import ModelConfig
from cramlab.tasks.srcd import SRCDConfig

ACCELERATORS = ("cpu", "cuda", "mps", "auto")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One length of the curriculum.

    Attributes:
        seq_len: tokens a sequence; None: the task's own length.
        batch_size: sequences an optimiser step.
        max_steps: steps spent here at most; the last stage takes whatever is left.
        until: validation retrieval at which the next stage begins; None: after `max_steps` only. A router must also
            have left its encoding phase.
    """

    seq_len: int | None = None
    batch_size: int = 16
    max_steps: int = 1000
    until: float | None = None

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        for name in ("batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.stages[].{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
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
        accelerator: of Lightning Fabric, one of `ACCELERATORS`.
        precision: of Lightning Fabric, one of `PRECISIONS`.
    """

    stages: tuple[Stage, ...] = (Stage(),)
    max_steps: int = 1000
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    average_decay: float = 0.99
    cooldown_steps: int = 200
    grad_clip: float = 1.0
    eval_every_steps: int = 50
    patience_evals: int = 6
    n_validation_tokens: int = 16_384
    n_test_tokens: int = 65_536
    test_seq_lens: tuple[int, ...] = ()
    encoding_target: float = 0.95
    audit_frac: float = 0.05
    audit_supervised_frac: float = 1.0
    temperature: float = 1.0
    semantic_rate: float = 1.0
    price_ramp_steps: int = 200
    loss: LossConfig = field(default_factory=LossConfig)
    log_every_steps: int = 10
    n_threads: int = 1
    accelerator: str = "cpu"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if not self.stages:
            raise ValueError("training.stages is empty; give at least one Stage()")
        positive = ("max_steps", "eval_every_steps", "patience_evals", "n_validation_tokens")
        for name in (*positive, "log_every_steps", "n_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} = {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "semantic_rate", "grad_clip", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name} = {getattr(self, name)} must be positive")
        for name in ("audit_frac", "audit_supervised_frac", "encoding_target", "average_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training.{name} = {getattr(self, name)} is not a share; give a number from 0 to 1")
        for name, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f'training.{name} = "{getattr(self, name)}" is unknown; give one of {", ".join(known)}'
                )
        for name in ("warmup_steps", "cooldown_steps", "price_ramp_steps", "weight_decay", "n_test_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} = {getattr(self, name)} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
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

    experiment: str
    size: str
    mixer: str
    seed: int
    task: SRCDConfig
    model: ModelConfig
    training: TrainingConfig
    variant: str = ""

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must be 0 or more")

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
        return self.task if stage.seq_len is None else dataclasses.replace(self.task, seq_len=stage.seq_len)
