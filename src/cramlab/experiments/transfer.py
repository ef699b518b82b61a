"""Transfer (the paper's claim C6): memory and router learned on SRCD, used on other tasks, against controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from cramlab.config import ConfigError
from cramlab.experiments.srcd import run_config
from cramlab.experiments.study import Study
from cramlab.experiments.transition import SEQ_LEN, Point, transition_config
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.tasks.copying import CopyingConfig
from cramlab.tasks.relabelling import RelabellingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.run import RunConfig, Stage, TrainingConfig
from cramlab.training.start import EMBEDDING, HEADS, TransferConfig

# Targets, by how they differ from the source. Inputs and answers have the same shape, so that embedding and heads can
# be transferred too. In the first four, which are of the paper's kind, no fact of the source is useful; in the others,
# which are ours, all of them are.
OTHER_FACTS: tuple[str, ...] = ("recall", "rebound", "patterns", "copy")
SAME_FACTS: tuple[str, ...] = ("relabel", "queries", "laws")
CONSOLIDATED: tuple[str, ...] = ("patterns", *SAME_FACTS)  # attention keeps falling after retrieval is learned
# What is transferred and what is trained, in the order of training. CONTROLS, SeqBoat and the random router are
# controls of the paper's claim; they run only on targets of its kind and on the first seeds.
WAYS: tuple[str, ...] = ("no_encoding", "scratch", "head", "all")
CONTROLS: tuple[str, ...] = ("untrained", "embedding")
N_SEEDS, N_CONTROL_SEEDS = 3, 1
SOURCE_STEPS = {"tiny": 60, "small": 2000}  # upper bounds; a run ends when its validation stops improving
STEPS = {"tiny": 40, "small": 1800}
BATCH_SIZE = {"tiny": 16, "small": 64}
OTHER_PATTERNS = 500  # added to the seed for other patterns


def transfer(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Memory and router from SRCD, frozen or trained on, on seven other tasks; with controls at the same reads."""
    if size not in STEPS:
        raise ConfigError(f'transfer has no runs at size "{size}"; give --size {" or ".join(STEPS)}')
    mixers = mixers or ("cram", "seqboat")
    if not set(mixers) <= {"cram", "seqboat"}:
        raise ConfigError(f"transfer has no runs of {', '.join(mixers)}; give cram or seqboat")
    seeds = range(N_SEEDS) if seed is None else (seed,)
    runs: list[RunConfig] = []
    for s in seeds:
        of_seed = [config for mixer in mixers for config in _runs(mixer, size, s)]
        runs += sorted(of_seed, key=lambda config: config.variant != "source")
    if not runs:
        raise ConfigError(f"transfer has no runs of seqboat at seed {seed}; give a seed below {N_CONTROL_SEEDS}")
    found = yield runs
    rates = {
        (record["seed"], record["variant"].partition("-")[0]): record["metrics"]["test"]["attention_frac"]
        for record in found
        if record["mixer"] == "cram" and record["variant"].endswith("-head")
    }
    last: list[RunConfig] = [
        random_config(size, s, target, rates[seed_of(s, target), target])
        for s in seeds
        for target in OTHER_FACTS
        if s < N_CONTROL_SEEDS and (seed_of(s, target), target) in rates
    ]
    if last:
        yield last


def _runs(mixer: str, size: str, seed: int) -> list[TransferConfig]:
    """The source and all runs that do not need a random router's rate."""
    if mixer == "seqboat":  # its routers learn from neither audits nor an encoding phase
        pairs = [(target, way) for way in ("scratch", "head") for target in OTHER_FACTS if seed < N_CONTROL_SEEDS]
    else:
        # Long runs come first. With the same facts, the encoding phase of `scratch` would add no information.
        pairs = [(target, way) for way in WAYS for target in (*SAME_FACTS, *OTHER_FACTS)]
        pairs = [(target, way) for target, way in pairs if target in OTHER_FACTS or way != "scratch"]
        if seed < N_CONTROL_SEEDS:
            pairs += [(target, way) for way in CONTROLS for target in OTHER_FACTS]
    runs = [target_config(mixer, size, seed, target, way) for target, way in pairs]
    return [source_config(mixer, size, seed), *runs] if runs else []


def source_config(mixer: str, size: str, seed: int) -> TransferConfig:
    """The run on SRCD at 64 tokens, until it has consolidated."""
    point = transition_config(Point("cram"), size, seed)
    config = run_config(mixer=mixer, size=size, seed=seed, experiment="transfer")
    return TransferConfig(
        experiment="transfer", size=size, mixer=mixer, seed=seed, task=point.task, model=config.model,
        training=dataclasses.replace(
            point.training, eval_every_steps=20, max_steps=SOURCE_STEPS[size], patience_evals=10,
            stages=(Stage(batch_size=BATCH_SIZE[size]),),
        ),
        variant="source",
    )  # fmt: skip


def target_task(target: str, size: str) -> SRCDConfig:
    """The task that the model is transferred to."""
    source = cast("SRCDConfig", transition_config(Point("cram"), size, 0).task)
    match target:
        case "recall":  # multi-query associative recall: many queries, all novel
            return dataclasses.replace(source, recurring_frac=0.0, query_frac=0.2, write_frac=0.2)
        case "rebound":  # the keys that the semantic memory knows, with other values in every sequence
            return dataclasses.replace(source, rebind_frac=1.0)
        case "patterns":  # SRCD with other recurring bindings, which depend on the seed
            return source
        case "copy":
            return CopyingConfig(seq_len=SEQ_LEN, n_patterns=source.n_patterns, n_values=source.n_values)
        case "relabel":  # the same bindings with relabelled answers
            return RelabellingConfig(seq_len=SEQ_LEN, n_patterns=source.n_patterns, n_values=source.n_values)
        case "queries":  # three times as many queries of the same bindings
            return dataclasses.replace(source, query_frac=0.15, write_frac=0.3)
        case "laws":  # the same bindings with other dynamics of the level
            return dataclasses.replace(source, decay=0.8, beta=1.0)
        case _:
            raise ConfigError(
                f'transfer target "{target}" is unknown; give one of {", ".join(OTHER_FACTS + SAME_FACTS)}'
            )


def seed_of(seed: int, target: str) -> int:
    """The seed of a target's data, which determines the recurring bindings."""
    return seed + OTHER_PATTERNS if target == "patterns" else seed


def target_config(mixer: str, size: str, seed: int, target: str, way: str) -> TransferConfig:
    """The run of one way (see `WAYS` and `CONTROLS`) on a target."""
    source = source_config(mixer, size, seed)
    carried = way in ("head", "embedding", "all")
    everything_but_the_gate = ("embedding.", "layers.0.mixer.working.", "layers.0.mixer.norm.",
                               "layers.0.mixer.episodic.", "layers.0.mixer.semantic.", "layers.0.mixer_norm.",
                               "layers.0.mlp", *HEADS)  # fmt: skip
    trainable = {"head": HEADS, "embedding": HEADS + EMBEDDING, "untrained": everything_but_the_gate}.get(way, ())
    return dataclasses.replace(
        source,
        seed=seed_of(seed, target),
        task=target_task(target, size),
        training=_training(source.training, size, target, way),
        variant=f"{target}-{way}",
        source=source.name if carried else "",
        trainable=trainable,
    )


def _training(like: TrainingConfig, size: str, target: str, way: str) -> TrainingConfig:
    """The training of a way: until validation stops improving, with an encoding phase only for "scratch".

    A gate that learns a target's facts needs hundreds of steps more than retrieval. A frozen gate learns nothing from
    audits, so it has none: reads in training are then the gate's own decisions.
    """
    frozen = way in ("head", "embedding", "untrained")
    return dataclasses.replace(
        like,
        max_steps=STEPS[size],
        eval_every_steps=10,  # reads until a goal is reached are counted at validations
        patience_evals=60 if target in CONSOLIDATED and not frozen else 20,
        cooldown_steps=min(like.cooldown_steps, 100),
        encoding_target=like.encoding_target if way == "scratch" else 0.0,
        audit_frac=0.0 if frozen else like.audit_frac,
        audit_supervised_frac=0.0 if frozen else like.audit_supervised_frac,
    )


def random_config(size: str, seed: int, target: str, rate: float) -> TransferConfig:
    """A run from scratch with a router that reads at random, at the measured rate of the transferred router."""
    like = target_config("cram", size, seed, target, "untrained")
    mixer = CRAMConfig(router=RouterConfig(name="random", random_frac=round(rate, 4)))
    return dataclasses.replace(
        like, mixer="cram-random", model=dataclasses.replace(like.model, mixer=mixer), variant=target, trainable=()
    )
