"""CRAM and the full-attention control on SRCD, at every size of the task."""

from __future__ import annotations

from cramlab.catalog import MIXERS
from cramlab.model import ModelConfig
from cramlab.tasks.srcd import SIZES
from cramlab.training.run import RunConfig, Stage, TrainingConfig

# Short sequences first: key matching does not depend on length, and is found hundreds of steps earlier with few
# distractors. 4,096 tokens a step in the short stages, 8,192 at the paper's length.
_SHORT = Stage(seq_len=64, batch_size=64, max_steps=600, until=0.97)
TRAINING: dict[str, TrainingConfig] = {
    # Seconds long, for tests and CI: long enough to leave the encoding phase, too short to learn much.
    "tiny": TrainingConfig(
        encoding_target=0.2,
        stages=(Stage(batch_size=16),),
        max_steps=60,
        warmup_steps=10,
        cooldown_steps=20,
        eval_every_steps=20,
        n_validation_tokens=1024,
        n_test_tokens=4096,
    ),
    "small": TrainingConfig(stages=(_SHORT, Stage(batch_size=16)), max_steps=2400),
    "medium": TrainingConfig(
        stages=(_SHORT, Stage(seq_len=256, batch_size=16, max_steps=600), Stage(batch_size=8)), max_steps=2600
    ),
    "paper": TrainingConfig(
        stages=(_SHORT, Stage(seq_len=256, batch_size=16, max_steps=800), Stage(batch_size=4)),
        max_steps=2600,
        n_validation_tokens=32_768,
        n_test_tokens=262_144,
    ),
}


def run_config(*, mixer: str, size: str, seed: int, experiment: str = "srcd") -> RunConfig:
    """One mixer on SRCD. Everything but the mixer is the same for all of them; the paper's layer keeps its Add&Norm."""
    return RunConfig(
        experiment=experiment,
        size=size,
        mixer=mixer,
        seed=seed,
        task=SIZES[size],
        model=ModelConfig(mixer=MIXERS[mixer](), norm="post" if mixer == "cram-paper" else "pre"),
        training=TRAINING[size],
    )


def srcd(*, size: str, seed: int) -> list[RunConfig]:
    """CRAM and the full-attention control side by side."""
    return [run_config(mixer=mixer, size=size, seed=seed) for mixer in ("cram", "transformer")]


def srcd_routers(*, size: str, seed: int) -> list[RunConfig]:
    """Routers compared: the paper's layer, and ours with every token, no token, random or the right tokens read."""
    mixers = ("cram-paper", "cram-always", "cram-never", "cram-random", "cram-oracle")
    return [run_config(mixer=mixer, size=size, seed=seed, experiment="srcd_routers") for mixer in mixers]
