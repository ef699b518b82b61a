"""Trains the language models that docs/language.md compares: one record for each arm and seed.

    python -m reproduction.protocols.language runs/language --corpus corpora/code --arms llama cram-12
    python -m reproduction.protocols.language runs/language --corpus corpora/code --tune 0.001 0.002 0.004 --arms llama

An arm is a kind of model; `--arms all` trains every one of `ARMS`. All arms of a corpus have one size in parameters
(those with a table of bigrams have it beyond them) and see the same windows in the same order. `--tune` instead tries
learning rates on validation text, in short runs with a seed of their own; the runs then take the best rate from their
records in OUT/tuning. The same call continues interrupted work.

`--set` changes a field of every run, and one of the CRAM model as well: `--set arm=layers-2-5 --set
'cram.memory_layers=[2, 5]'` makes another arm of a listed one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cramlab import records
from cramlab.config import ConfigError, overridden
from cramlab.language_model.evaluation import evaluate
from cramlab.language_model.recall import recall
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.scoring import score
from cramlab.language_model.text import PreparedText, held_out_windows, open_corpus
from cramlab.language_model.training import run_text

TUNING_SEED = 1000
N_WINDOWS = 512
BASE = TextRunConfig(
    vocab_size=8192, context=1024, n_layers=8, d_model=512, n_heads=8, batch_size=32, n_steps=2000, warmup_steps=100,
    weight_decay=0.1, learning_rate=0.002, eval_every_steps=100, encoding_frac=0.5, least_gain=0.02, ramp_frac=0.1,
    precision="bf16", compile=True,
)  # fmt: skip
WINDOW = {"window": 128}
BIGRAMS = {"bigram_slots": 5 * BASE.vocab_size}
_DELTA = {"working": "delta", "rope": True, "qk_norm": True}
_GATED = _DELTA | {
    "router": "benefit", "gate_learns": "nats", "gate_width": 128, "judged_frac": 0.25, "benefit_cap": 4.0,
}  # fmt: skip


def _fixed(*layers: int, router: str = "always", **changes: Any) -> dict[str, Any]:
    """A model whose attention layers follow a rule that nothing learns."""
    return {"cram": _DELTA | {"memory_layers": list(layers), "router": router} | changes}


def _gated(layers: tuple[int, ...], share: float, **changes: Any) -> dict[str, Any]:
    return {"cram": _GATED | {"memory_layers": list(layers)} | changes, "reads_frac": share}


# What each arm changes in `BASE`. With eight layers, layer-4 is Jamba's hybrid (one of eight, the fifth), layer-7 has
# attention in every eighth layer, and layers-3-7 in every fourth (1:7 and 1:3).
ARMS: dict[str, dict[str, Any]] = {
    "llama": {"model": "llama"},
    "llama-window": {"model": "llama"} | WINDOW,
    "recurrent": _fixed(),
    **{f"layer-{i}": _fixed(i) for i in range(8)},
    **{f"layers-{i}-{j}": _fixed(i, j) for i, j in ((2, 6), (3, 7), (4, 7), (5, 7), (6, 7), (5, 6))},
    "layers-3-5-7": _fixed(3, 5, 7),
    "all-layers": _fixed(*range(8)),
    "cram-12": _gated((3, 5, 7), 0.124),
    "cram-3": _gated((3, 5, 7), 0.029),
    "soft-12": _gated((3, 5, 7), 0.124, gate_learns="soft"),
    "straight-12": _gated((3, 5, 7), 0.124, gate_learns="straight"),
    "random-12": _fixed(3, 5, 7, router="random", random_frac=0.124 * 8 / 3),
    "window": _fixed(3, 5, 7, router="never") | WINDOW,
    "cram-12-window": _gated((3, 5, 7), 0.124) | WINDOW,
    "soft-12-window": _gated((3, 5, 7), 0.124, gate_learns="soft") | WINDOW,
    "llama-bigrams": {"model": "llama"} | BIGRAMS,
    "layer-7-bigrams": _fixed(7) | BIGRAMS,
    "cram-12-bigrams": _gated((3, 5, 7), 0.124) | BIGRAMS,
}
# The model in artifacts/, of another size and therefore no arm of the comparison.
SHIPPED = {"ship": _gated((3, 5, 7), 0.124) | {"d_model": 256, "n_heads": 4, "n_checkpoints": 1}}


def configs(base: TextRunConfig, arms: Sequence[str], assignments: Sequence[str]) -> list[TextRunConfig]:
    """The runs of arms.

    Args:
        base: what the arms have in common.
        arms: names in `ARMS` or `SHIPPED`.
        assignments: `FIELD=VALUE` each, applied after what the arm changes; `cram.FIELD=VALUE`, with a value in JSON,
            changes a field of `CRAMForCausalLMConfig` in the arms that are CRAM models.

    Raises:
        ConfigError: for a field that does not exist or a value that does not fit.
    """
    of_cram = {}
    for text in (text for text in assignments if text.startswith("cram.")):
        name, _, value = text.removeprefix("cram.").partition("=")
        try:
            of_cram[name] = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"cram.{name} = {value} is not JSON; write text in quotes, lists in brackets") from error
    others = [text for text in assignments if not text.startswith("cram.")]
    made = []
    for arm in arms:
        config = dataclasses.replace(base, arm=arm, **(ARMS | SHIPPED)[arm])
        if config.model == "cram":
            config = dataclasses.replace(config, cram=config.cram | of_cram)
        made.append(overridden(config, others))
    return made


def assessed(model: PreTrainedModel, *, text: PreparedText, config: TextRunConfig, at_once: int = 1) -> dict[str, Any]:
    """Losses and reads in slices of the test text, recall in context, and the loss on validation text, for choices.

    The times of steps are those with as many runs `at_once` on the device.

    A token of a CRAM model is as hard as the model finds it without reads.
    """
    how: dict[str, Any] = {"batch_size": config.batch_size, "autocast": config.precision == "bf16"}
    windows = held_out_windows(text, "test", config.context, N_WINDOWS)
    hardness = score(model, windows, **how, read_none=True).nats if config.routes else None
    validation = score(model, held_out_windows(text, "validation", config.context, N_WINDOWS), **how).nats
    return {
        "test": evaluate(model, text, context=config.context, n_windows=N_WINDOWS, hardness=hardness, **how),
        "recall": recall(model, text, context=2 * config.context, **how),  # also at a length it was not trained on
        "validation_nats": float(validation.double().mean()),
        "runs_at_once": at_once,
    }


def one(config: TextRunConfig, corpus: Path, out: Path, deadline: float, at_once: int = 1) -> str | None:
    """Trains one model in a process of its own; returns why there is no record, or None."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 8))
    if config.precision == "bf16":
        torch.set_float32_matmul_precision("high")
    text = open_corpus(corpus)
    assess = None
    if config.part != "validation":
        assess = functools.partial(assessed, text=text, config=config, at_once=at_once)
    try:
        run_text(config, text, out, lambda line: print(line, file=sys.stderr, flush=True), deadline, assess)
    except (TimeoutError, FloatingPointError) as error:
        return str(error)
    return None


def best_rate(tuned: Path, arm: str) -> float | None:
    """The learning rate of an arm with the lowest loss on validation text; None: it was not tuned."""
    found = [records.read_json(path) for path in sorted(tuned.glob("*.json"))]
    mine = [record for record in found if record["config"]["arm"] == arm]
    losses = {record["config"]["learning_rate"]: record["series"][-1]["nats_per_token"] for record in mine}
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def main(given: Sequence[str] | None = None) -> int:
    """Returns 3 when a run has no record yet, because time ran out or it diverged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by reproduction.protocols.corpora")
    names = [*ARMS, *SHIPPED]
    parser.add_argument(
        "--arms", nargs="+", default=["all"], choices=["all", *names], metavar="ARM", help=", ".join(names)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tune", nargs="+", type=float, default=[], metavar="RATE", help="try these rates instead")
    parser.add_argument("--tuning-steps", type=int, default=300)
    parser.add_argument(
        "--rates-of", action="append", default=[], metavar="ARM=OTHER", help="take the rate of another arm"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop at the first checkpoint after this time")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="field of every run")
    args = parser.parse_args(given)
    deadline = time.time() + 60 * args.minutes
    arms = list(ARMS) if "all" in args.arms else args.arms
    others = dict(pair.split("=", 1) for pair in args.rates_of)
    jobs: list[tuple[TextRunConfig, Path]] = []
    wanted = configs(dataclasses.replace(BASE, device=args.device), arms, args.set)
    for seed in [TUNING_SEED] if args.tune else args.seeds:
        for config in (dataclasses.replace(config, seed=seed) for config in wanted):
            if args.tune:
                short = dataclasses.replace(config, part="validation", n_steps=args.tuning_steps, n_checkpoints=0)
                jobs += [(dataclasses.replace(short, learning_rate=rate), args.out / "tuning") for rate in args.tune]
                continue
            rate = best_rate(args.out / "tuning", others.get(config.arm, config.arm)) or config.learning_rate
            jobs.append((dataclasses.replace(config, learning_rate=rate), args.out))
    spawn = multiprocessing.get_context("spawn")  # an accelerator does not survive a fork
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        running = [pool.submit(one, config, args.corpus, out, deadline, args.jobs) for config, out in jobs]
        reasons = [reason for job in running if (reason := job.result()) is not None]
    print("\n".join(reasons), file=sys.stderr)
    return 3 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
