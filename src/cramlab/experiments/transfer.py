"""Transfer (paper's claim C6): memory and router learned on SRCD, carried to other tasks, against fair controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cramlab.config import ConfigError
from cramlab.experiments.srcd import run_config
from cramlab.experiments.study import Study
from cramlab.experiments.transition import SEQ_LEN, Point, transition_config
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.tasks.copying import CopyingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.run import Stage, TrainingConfig
from cramlab.training.start import EMBEDDING, HEADS, TransferConfig

# Targets, by what sets them apart from the source. Inputs and answers have the same shape, so that embedding and heads
# can be carried over too.
TARGETS: tuple[str, ...] = ("recall", "rebound", "patterns", "copy")
# What is carried over and what is trained.
WAYS: tuple[str, ...] = ("scratch", "head", "all", "embedding", "untrained")
SOURCE_STEPS = {"tiny": 60, "small": 800}
STEPS = {"tiny": 40, "small": 1200}  # at most; a run ends when its validation stops improving
BATCH_SIZE = {"tiny": 16, "small": 32}
OTHER_PATTERNS = 500  # added to the seed where the patterns are to be others


def transfer(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Memory and router from SRCD, frozen or trained on, on four other tasks; with controls at the same reads."""
    if size not in STEPS:
        raise ConfigError(f'transfer has no runs at size "{size}"; give --size {" or ".join(STEPS)}')
    seed = seed or 0
    mixers = mixers or ("cram", "seqboat")
    if not set(mixers) <= {"cram", "seqboat"}:
        raise ConfigError(f"transfer has no runs of {', '.join(mixers)}; give cram or seqboat")
    yield [source_config(mixer, size, seed) for mixer in mixers]
    runs = []
    for mixer in mixers:
        # Nothing of SeqBoat's is new when frozen routers are untrained, and its control is one of transfer alone.
        ways = WAYS if mixer == "cram" else ("scratch", "head")
        runs += [target_config(mixer, size, seed, target, way) for way in ways for target in TARGETS]
    found = yield runs
    rates = {
        record["variant"].partition("-")[0]: record["metrics"]["test"]["attention_frac"]
        for record in found
        if record["mixer"] == "cram" and record["variant"].endswith("-head")
    }
    if rates:
        yield [random_config(size, seed, target, rate) for target, rate in rates.items()]


def source_config(mixer: str, size: str, seed: int) -> TransferConfig:
    """SRCD itself at 64 tokens."""
    point = transition_config(Point("cram"), size, seed)
    config = run_config(mixer=mixer, size=size, seed=seed, experiment="transfer")
    return TransferConfig(
        experiment="transfer", size=size, mixer=mixer, seed=seed, task=point.task, model=config.model,
        training=dataclasses.replace(
            point.training, eval_every_steps=20, max_steps=SOURCE_STEPS[size],
            stages=(Stage(batch_size=BATCH_SIZE[size]),),
        ),
        variant="source",
    )  # fmt: skip


def target_task(target: str, size: str) -> SRCDConfig:
    """What the model is carried to."""
    source = transition_config(Point("cram"), size, 0).task
    match target:
        case "recall":  # multi-query associative recall: many queries, all of them novel
            return dataclasses.replace(source, recurring_frac=0.0, query_frac=0.2, write_frac=0.2)
        case "rebound":  # the very keys that the semantic memory knows, with other values in every sequence
            return dataclasses.replace(source, rebind_frac=1.0)
        case "patterns":  # SRCD with other recurring bindings, which the seed draws
            return source
        case "copy":
            return CopyingConfig(seq_len=SEQ_LEN, n_patterns=source.n_patterns, n_values=source.n_values)
        case _:
            raise ConfigError(f'transfer target "{target}" is unknown; give one of {", ".join(TARGETS)}')


def target_config(mixer: str, size: str, seed: int, target: str, way: str) -> TransferConfig:
    """One way of meeting a target."""
    source = source_config(mixer, size, seed)
    carried = way in ("head", "embedding", "all")
    everything_but_the_gate = ("embedding.", "layers.0.mixer.working.", "layers.0.mixer.norm.",
                               "layers.0.mixer.episodic.", "layers.0.mixer.semantic.", "layers.0.mixer_norm.",
                               "layers.0.mlp", *HEADS)  # fmt: skip
    trainable = {"head": HEADS, "embedding": HEADS + EMBEDDING, "untrained": everything_but_the_gate}.get(way, ())
    return dataclasses.replace(
        source,
        seed=seed + OTHER_PATTERNS if target == "patterns" else seed,
        task=target_task(target, size),
        training=_training(source.training, size, way),
        variant=f"{target}-{way}",
        source=source.name if carried else "",
        trainable=trainable,
    )


def _training(like: TrainingConfig, size: str, way: str) -> TrainingConfig:
    """Until validation stops improving; no encoding phase for a router that is carried over or never learns.

    A frozen gate has no use for audits, so it makes none: training reads are then what the gate itself lets through.
    """
    frozen = way in ("head", "embedding", "untrained")
    return dataclasses.replace(
        like,
        max_steps=STEPS[size],
        patience_evals=6,
        cooldown_steps=min(like.cooldown_steps, 100),
        encoding_target=like.encoding_target if way == "scratch" else 0.0,
        audit_frac=0.0 if frozen else like.audit_frac,
        audit_supervised_frac=0.0 if frozen else like.audit_supervised_frac,
    )


def random_config(size: str, seed: int, target: str, rate: float) -> TransferConfig:
    """A router that draws its reads by lot, from scratch, at the rate that the carried router was measured at."""
    like = target_config("cram", size, seed, target, "untrained")
    mixer = CRAMConfig(router=RouterConfig(name="random", random_frac=round(rate, 4)))
    return dataclasses.replace(
        like, mixer="cram-random", model=dataclasses.replace(like.model, mixer=mixer), variant=target, trainable=()
    )
