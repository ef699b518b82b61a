"""CRAM and the full-attention control on SRCD, at every size of the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cramlab.experiments.study import Study
from cramlab.experiments.variants import model_of, short_name
from cramlab.objective import LossConfig
from cramlab.tasks.srcd import SIZES
from cramlab.training.run import RunConfig, Stage, TrainingConfig

# With a smaller weight of the squared error, the nats of retrieval outweigh it and no model reaches the noise floor.
# With a lower cap on the benefit, the gate underestimates the cost of a missed read.
_LOSS = LossConfig(dynamics_weight=10.0, benefit_cap=5.0)
# Short sequences come first: key matching does not depend on length and is learned hundreds of steps earlier with few
# distractors. A step has 4,096 tokens in the short stages and 8,192 at the paper's length.
_SHORT = Stage(seq_len=64, batch_size=64, max_steps=600, until=0.97)
TRAINING: dict[str, TrainingConfig] = {
    # A smoke test of seconds: it leaves the encoding phase and learns little.
    "tiny": TrainingConfig(
        encoding_target=0.2,
        average_decay=0.8,
        stages=(Stage(batch_size=16),),
        max_steps=60,
        warmup_steps=10,
        cooldown_steps=20,
        eval_every_steps=20,
        n_validation_tokens=1024,
        n_test_tokens=4096,
    ),
    # A first look in about 90 seconds: the encoding phase ends near step 400, then attention falls to the optimum.
    "quick": TrainingConfig(
        stages=(Stage(batch_size=32),),
        max_steps=750,
        cooldown_steps=150,
        learning_rate=4e-3,
        semantic_rate=3.0,
        loss=_LOSS,
    ),
    "small": TrainingConfig(
        stages=(_SHORT, Stage(batch_size=16)), max_steps=2400, patience_evals=8, cooldown_steps=300, loss=_LOSS
    ),
    "medium": TrainingConfig(
        stages=(_SHORT, Stage(seq_len=256, batch_size=16, max_steps=600), Stage(batch_size=8)),
        max_steps=2600,
        loss=_LOSS,
    ),
    "paper": TrainingConfig(
        stages=(_SHORT, Stage(seq_len=256, batch_size=16, max_steps=800), Stage(batch_size=4)),
        max_steps=2600,
        loss=_LOSS,
        n_validation_tokens=32_768,
        n_test_tokens=262_144,
    ),
}


def run_config(*, mixer: str, size: str, seed: int, experiment: str = "srcd") -> RunConfig:
    """The run of one mixer on SRCD. Everything else is the same for all mixers, except what its variant changes."""
    model, training = model_of(mixer, TRAINING[size])
    return RunConfig(
        experiment=experiment,
        size=size,
        mixer=short_name(mixer),
        seed=seed,
        task=SIZES[size],
        model=model,
        training=training,
    )


def srcd(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """CRAM and the full-attention control side by side."""
    yield [run_config(mixer=mixer, size=size, seed=seed or 0) for mixer in mixers or ("cram", "transformer")]


def srcd_routers(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Routers compared: the paper's layer, and ours with every token, no token, random or the right tokens read."""
    mixers = mixers or ("cram-paper", "cram-always", "cram-never", "cram-random", "cram-oracle")
    yield [run_config(mixer=mixer, size=size, seed=seed or 0, experiment="srcd_routers") for mixer in mixers]


def srcd_deep(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Four layers instead of one; the paper's size needs an accelerator."""
    configs = [
        run_config(mixer=mixer, size=size, seed=seed or 0, experiment="srcd_deep")
        for mixer in mixers or ("cram", "transformer", "seqboat", "price-only")
    ]
    # Four gates take longer than one to learn which tokens should read.
    yield [
        dataclasses.replace(
            c,
            model=dataclasses.replace(c.model, n_layers=4),
            training=dataclasses.replace(c.training, patience_evals=12),
        )
        for c in configs
    ]
