"""Trains the language models that docs/language.md compares: one record for each arm and seed.

    python -m reproduction.protocols.language runs/language --corpus corpora/code --arms llama cram-12
    python -m reproduction.protocols.language runs/language --corpus corpora/code --tune 0.001 0.002 0.004 --arms llama

An arm is a kind of model; `--arms all` trains every one. All arms of a corpus have one size in parameters and see the
same windows in the same order. `--tune` instead tries learning rates on validation text, in short runs with a seed of
their own; the runs then take the best rate from their records in OUT/tuning. The same call continues interrupted work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cramlab import records
from cramlab.config import overridden
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
_DELTA = {"working": "delta", "rope": True, "qk_norm": True}
_GATED = _DELTA | {
    "router": "benefit", "gate_learns": "nats", "gate_width": 128, "judged_frac": 0.25, "benefit_cap": 4.0,
}  # fmt: skip


def _fixed(*layers: int) -> dict[str, Any]:
    """A model whose attention layers always read."""
    return {"cram": _DELTA | {"memory_layers": list(layers), "router": "always"}}


def _gated(layers: tuple[int, ...], share: float, **changes: Any) -> dict[str, Any]:
    return {"cram": _GATED | {"memory_layers": list(layers)} | changes, "reads_frac": share}


# What each arm changes in `BASE`.
ARMS: dict[str, dict[str, Any]] = {
    "llama": {"model": "llama"},
    "recurrent": _fixed(),
    **{f"layer-{i}": _fixed(i) for i in range(8)},
    "layers-3-7": _fixed(3, 7),
    "layers-6-7": _fixed(6, 7),
    "layers-3-5-7": _fixed(3, 5, 7),
    "all-layers": _fixed(*range(8)),
    "cram-12": _gated((3, 5, 7), 0.125),
    "cram-3": _gated((3, 5, 7), 0.03),
    "soft-12": _gated((3, 5, 7), 0.125, gate_learns="soft"),
    "straight-12": _gated((3, 5, 7), 0.125, gate_learns="straight"),
}


def assessed(model: PreTrainedModel, *, text: PreparedText, config: TextRunConfig) -> dict[str, Any]:
    """Losses and reads in slices of the test text, and recall in context.

    A token of a CRAM model is as hard as the model finds it without reads.
    """
    how: dict[str, Any] = {"batch_size": config.batch_size, "autocast": config.precision == "bf16"}
    windows = held_out_windows(text, "test", config.context, N_WINDOWS)
    hardness = score(model, windows, **how, read_none=True).nats if config.learns_gates else None
    return {
        "test": evaluate(model, text, context=config.context, n_windows=N_WINDOWS, hardness=hardness, **how),
        "recall": recall(model, text, context=config.context, **how),
    }


def one(config: TextRunConfig, corpus: Path, out: Path, deadline: float) -> str | None:
    """Trains one model in a process of its own; returns why there is no record, or None."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 8))
    if config.precision == "bf16":
        torch.set_float32_matmul_precision("high")
    text = open_corpus(corpus)
    assess = None if config.part == "validation" else functools.partial(assessed, text=text, config=config)
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


def main() -> int:
    """Returns 3 when a run has no record yet, because time ran out or it diverged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by reproduction.protocols.corpora")
    parser.add_argument(
        "--arms", nargs="+", default=["all"], choices=["all", *ARMS], metavar="ARM", help=", ".join(ARMS)
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
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    arms = list(ARMS) if "all" in args.arms else args.arms
    base = overridden(dataclasses.replace(BASE, device=args.device), args.set)
    others = dict(pair.split("=", 1) for pair in args.rates_of)
    jobs: list[tuple[TextRunConfig, Path]] = []
    for seed in [TUNING_SEED] if args.tune else args.seeds:
        for arm in arms:
            config = dataclasses.replace(base, arm=arm, seed=seed, **ARMS[arm])
            if args.tune:
                short = dataclasses.replace(config, part="validation", n_steps=args.tuning_steps)
                jobs += [(dataclasses.replace(short, learning_rate=rate), args.out / "tuning") for rate in args.tune]
                continue
            rate = best_rate(args.out / "tuning", others.get(arm, arm)) or config.learning_rate
            jobs.append((dataclasses.replace(config, learning_rate=rate), args.out))
    spawn = multiprocessing.get_context("spawn")  # an accelerator does not survive a fork
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        running = [pool.submit(one, config, args.corpus, out, deadline) for config, out in jobs]
        reasons = [reason for job in running if (reason := job.result()) is not None]
    print("\n".join(reasons), file=sys.stderr)
    return 3 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
