"""Multi-query associative recall (MQAR): whether CRAM reads for queries alone, beside full attention and a delta rule.

All models have width 64. A stage of 16 tokens, in which every second token after the pairs asks, comes before the 64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cramlab.config import ConfigError
from cramlab.experiments.study import Study
from cramlab.experiments.variants import model_of, short_name
from cramlab.memory import AdapterConfig, CRAMConfig, DeltaMemoryConfig
from cramlab.objective import LossConfig
from cramlab.tasks.mqar import MQARConfig
from cramlab.training.run import RunConfig, Stage, TrainingConfig

N_SEEDS = 3
WIDTH = 64
DELTA = DeltaMemoryConfig(n_heads=4, d_head=WIDTH // 4)
# "cram-always" is full attention with CRAM's own layer. Without positions, one layer of a Transformer cannot find the
# token after a key, so it has two; "hybrid" has a recurrence before its layer of attention.
MIXERS = ("cram", "cram-delta", "cram-always", "delta-rule", "hybrid", "transformer")
_LOSS = LossConfig(retrieval_emphasis=1.0, benefit_cap=5.0)
VOCAB_SIZES = {"tiny": 32, "quick": 64, "small": 8192}
TRAINING = {
    "tiny": TrainingConfig(
        stages=(Stage(batch_size=4),),
        max_steps=20,
        warmup_steps=5,
        cooldown_steps=5,
        encoding_target=0.05,
        average_decay=0.8,
        eval_every_steps=10,
        n_validation_tokens=512,
        n_test_tokens=512,
        loss=_LOSS,
    ),
    # Minutes on one core: few enough tokens that each is seen often.
    "quick": TrainingConfig(
        stages=(Stage(seq_len=16, batch_size=64, max_steps=600, until=0.97), Stage(batch_size=16)),
        max_steps=1000,
        cooldown_steps=200,
        learning_rate=5e-3,
        encoding_target=0.9,
        n_validation_tokens=8192,
        n_test_tokens=32_768,
        loss=_LOSS,
    ),
    # For an accelerator: each of 8,192 tokens must be met often enough to be told apart.
    "small": TrainingConfig(
        stages=(Stage(seq_len=16, batch_size=256, max_steps=4000, until=0.97), Stage(batch_size=128)),
        max_steps=8000,
        cooldown_steps=500,
        learning_rate=2e-3,
        patience_evals=12,
        loss=_LOSS,
    ),
}


def mqar(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Associative recall, three seeds: reads of CRAM beside full attention, a delta rule and a hybrid."""
    if size not in TRAINING:
        raise ConfigError(f'mqar has no runs at size "{size}"; give --size {", ".join(TRAINING)}')
    seeds = range(N_SEEDS) if seed is None else (seed,)
    yield [mqar_config(mixer, size, s) for s in seeds for mixer in mixers or MIXERS]


def mqar_config(mixer: str, size: str, seed: int) -> RunConfig:
    """The run of one mixer at width 64."""
    model, training = model_of(mixer, TRAINING[size])
    layer = model.mixer
    if isinstance(layer, CRAMConfig):
        working = DELTA if isinstance(layer.working, DeltaMemoryConfig) else layer.working
        semantic = AdapterConfig(rank=WIDTH) if isinstance(layer.semantic, AdapterConfig) else layer.semantic
        layer = dataclasses.replace(layer, working=working, semantic=semantic)
    n_layers = 2 if mixer == "transformer" else model.n_layers
    return RunConfig(
        experiment="mqar",
        size=size,
        mixer=short_name(mixer),
        seed=seed,
        task=MQARConfig(vocab_size=VOCAB_SIZES[size]),
        model=dataclasses.replace(model, mixer=layer, n_layers=n_layers, d_model=WIDTH, d_mlp=2 * WIDTH),
        training=training,
    )
