"""Trains CRAM language models at several prices of a read, a Llama of the same size and a 1:7 hybrid.

    python -m reproduction.protocols.text_run runs/text --device cuda --jobs 6 --seeds 0 1 --minutes 20   # one GPU
    python -m reproduction.protocols.text_run runs/text --layers 8 --width 128 --context 256 --batch 16 --steps 300

The learning rate of each kind of model is tuned first, by runs of half the steps with a seed of their own on validation
text that is not used otherwise (CRAM at its middle price). The same call continues interrupted work. With the records
in
results/text (`cp runs/text/*.json results/text`), `reproduction/pages/text.py` renews docs/tables/language.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cramlab.auditing.text import read_corpus
from cramlab.language_model.run import ModelName, TextRunConfig
from cramlab.language_model.text import PreparedText, prepare
from cramlab.language_model.training import run_text

MODELS: tuple[str, ...] = tuple(name for name in ModelName.__args__ if name != "gpt2")  # type: ignore[attr-defined]
TUNING_SEED = 1000
Record = dict[str, Any]


def one(
    config: TextRunConfig, text: PreparedText, out: Path, deadline: float
) -> Record | TimeoutError | FloatingPointError:
    """A run's record, or the reason why there is none."""
    torch.set_num_threads(1)
    try:
        return run_text(config, text, out, lambda line: print(line, file=sys.stderr, flush=True), deadline)
    except (TimeoutError, FloatingPointError) as error:
        return error


def best_rates(records: list[Record]) -> dict[str, float]:
    """The learning rate with the lowest final loss, by model; models that always diverged are left out."""
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        model, rate = record["config"]["model"], record["config"]["learning_rate"]
        nats = record["series"][-1]["nats_per_token"]
        if math.isfinite(nats):
            found[model] = min((nats, rate), found.get(model, (nats, rate)))
    return {model: rate for model, (_, rate) in found.items()}


def main() -> int:
    """Returns 3 when time ran out before every run had finished, 1 when a run diverged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    prices = [0.0, 0.001, 0.003, 0.01, 0.03]
    parser.add_argument("--prices", nargs="+", type=float, default=prices, help="prices of a read in nats; for cram")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--steps", type=int, default=600)
    rates = [0.001, 0.002, 0.004, 0.008, 0.016]
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=rates,
        help="learning rates to choose from; a single one is used without tuning",
    )
    parser.add_argument("--device", nargs="+", default=["cpu"], help="one device, or several that the runs use in turn")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop at the first checkpoint after this time")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    sizes: dict[str, Any] = {
        "n_layers": args.layers, "d_model": args.width, "context": args.context, "batch_size": args.batch,
    }  # fmt: skip
    documents = [(document.name, document.text) for document in read_corpus("stdlib").documents]
    text = prepare(documents, args.out, TextRunConfig.vocab_size)
    text = dataclasses.replace(text, tokenizer=None)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run(configs: list[TextRunConfig]) -> list[Record]:
            """Records of the runs that did not diverge; exits with 3 when time ran out before one had finished."""
            turns = [dataclasses.replace(c, device=args.device[i % len(args.device)]) for i, c in enumerate(configs)]
            ended = [job.result() for job in [pool.submit(one, config, text, args.out, deadline) for config in turns]]
            reasons = [error for error in ended if isinstance(error, Exception)]
            print("\n".join(map(str, reasons)), file=sys.stderr)
            if any(isinstance(error, TimeoutError) for error in reasons):
                raise SystemExit(3)
            return [record for record in ended if not isinstance(record, Exception)]

        middle = sorted(args.prices)[len(args.prices) // 2]
        tuning = [
            TextRunConfig(
                model=model, seed=TUNING_SEED, learning_rate=rate, read_price=middle,
                n_steps=max(1, args.steps // 2), warmup_steps=min(100, args.steps // 6), part="validation",
                eval_every_steps=max(1, args.steps // 6), **sizes,
            )
            for model in args.models
            for rate in args.rates
        ]  # fmt: skip
        first: float = args.rates[0]
        rates = best_rates(run(tuning)) if len(args.rates) > 1 else dict.fromkeys(args.models, first)
        print(rates, file=sys.stderr)
        if diverged := set(args.models) - rates.keys():
            print(f"{', '.join(diverged)}: diverged at all of --rates; give lower ones", file=sys.stderr)
            return 1
        # All models and prices of a seed come before the next seed.
        configs = [
            TextRunConfig(
                model=model, seed=seed, learning_rate=rates[model], read_price=price,
                n_steps=args.steps, warmup_steps=min(100, args.steps // 6),
                eval_every_steps=max(1, args.steps // 6), **sizes,
            )
            for seed in args.seeds
            for model in args.models
            for price in (args.prices if model == "cram" else args.prices[:1])
        ]  # fmt: skip
        return 0 if len(run(configs)) == len(configs) else 1


if __name__ == "__main__":
    sys.exit(main())
