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
from cramlab.tasks.relabelling import RelabellingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.run import RunConfig, Stage, TrainingConfig
from cramlab.training.start import EMBEDDING, HEADS, TransferConfig

# Targets, by what sets them apart from the source. Inputs and answers have the same shape, so that embedding and heads
# can be carried over too. In the first four, which are the paper's kind, none of the source's facts is of use; in the
# others, which are ours, all of them are.
OTHER_FACTS: tuple[str, ...] = ("recall", "rebound", "patterns", "copy")
SAME_FACTS: tuple[str, ...] = ("relabel", "queries", "laws")
CONSOLIDATED: tuple[str, ...] = ("patterns", *SAME_FACTS)  # where attention goes on falling once retrieval is right
# What is carried over and what is trained, in the order of running. The latter, and SeqBoat and the random router, are
# controls of the paper's claim: at its kind of target alone, and on the first seeds alone.
WAYS: tuple[str, ...] = ("no_encoding", "scratch", "head", "all")
CONTROLS: tuple[str, ...] = ("untrained", "embedding")
N_SEEDS, N_CONTROL_SEEDS = 3, 1
SOURCE_STEPS = {"tiny": 60, "small": 2000}  # at most; a run ends when its validation stops improving
STEPS = {"tiny": 40, "small": 1800}
BATCH_SIZE = {"tiny": 16, "small": 64}
OTHER_PATTERNS = 500  # added to the seed where the patterns are to be others


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
    """The source, and what needs no random rate; what starts from the source waits for it alone."""
    if mixer == "seqboat":  # its routers never learn by audit or decree
        pairs = [(target, way) for way in ("scratch", "head") for target in OTHER_FACTS if seed < N_CONTROL_SEEDS]
    else:
        # Long runs first. Where facts are the same, the encoding phase of `scratch` would tell nothing new.
        pairs = [(target, way) for way in WAYS for target in (*SAME_FACTS, *OTHER_FACTS)]
        pairs = [(target, way) for target, way in pairs if target in OTHER_FACTS or way != "scratch"]
        if seed < N_CONTROL_SEEDS:
            pairs += [(target, way) for way in CONTROLS for target in OTHER_FACTS]
    runs = [target_config(mixer, size, seed, target, way) for target, way in pairs]
    return [source_config(mixer, size, seed), *runs] if runs else []


def source_config(mixer: str, size: str, seed: int) -> TransferConfig:
    """SRCD itself at 64 tokens, until it has consolidated."""
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
        case "relabel":  # the same bindings, the answers under other names
            return RelabellingConfig(seq_len=SEQ_LEN, n_patterns=source.n_patterns, n_values=source.n_values)
        case "queries":  # three times as many questions about the same bindings
            return dataclasses.replace(source, query_frac=0.15, write_frac=0.3)
        case "laws":  # the same bindings in a level that moves otherwise
            return dataclasses.replace(source, decay=0.8, beta=1.0)
        case _:
            raise ConfigError(
                f'transfer target "{target}" is unknown; give one of {", ".join(OTHER_FACTS + SAME_FACTS)}'
            )


def seed_of(seed: int, target: str) -> int:
    """The seed of a target's data, which is what draws the recurring bindings."""
    return seed + OTHER_PATTERNS if target == "patterns" else seed


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
        seed=seed_of(seed, target),
        task=target_task(target, size),
        training=_training(source.training, size, target, way),
        variant=f"{target}-{way}",
        source=source.name if carried else "",
        trainable=trainable,
    )


def _training(like: TrainingConfig, size: str, target: str, way: str) -> TrainingConfig:
    """Until validation stops improving; an encoding phase for one of the two ways from scratch alone.

    A gate that is learning a target's facts shows it hundreds of steps after retrieval has become right. A frozen gate
    has no use for audits, so it makes none: training reads are then what the gate itself lets through.
    """
    frozen = way in ("head", "embedding", "untrained")
    return dataclasses.replace(
        like,
        max_steps=STEPS[size],
        eval_every_steps=10,  # reads up to a goal are counted at validations
        patience_evals=60 if target in CONSOLIDATED and not frozen else 20,
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
