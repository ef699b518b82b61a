"""Trains CRAM language models, a point for each price of a read, beside a Llama of as many parameters and a 1:7 hybrid.

    python tools/text_run.py runs/text --device cuda --jobs 6 --seeds 0 1 --minutes 6   # sizes for one GPU
    python tools/text_run.py runs/text --layers 8 --width 128 --context 256 --batch 16 --steps 300   # for one core

Called again, it goes on where it was. With the records in results/text (`cp runs/text/*.json results/text`),
`tools/text_tables.py` renews docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cramlab.audit.text import read_corpus
from cramlab.hf.pretrain import PreparedText, prepare
from cramlab.hf.text_run import ModelName, TextRunConfig, run_text

MODELS: tuple[str, ...] = ModelName.__args__  # type: ignore[attr-defined]


def one(config: TextRunConfig, text: PreparedText, out: Path, deadline: float) -> str | None:
    """A run; returns why it stopped early."""
    torch.set_num_threads(1)
    try:
        run_text(config, text, out, lambda line: print(line, file=sys.stderr, flush=True), deadline)
    except TimeoutError as error:
        return str(error)
    return None


def main() -> int:
    """Returns 3 when time ran out before every run had finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    prices = [0.0, 0.001, 0.003, 0.01, 0.03]
    parser.add_argument("--prices", nargs="+", type=float, default=prices, help="of a read, nats; for cram")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop at a checkpoint after so long")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    sizes: dict[str, Any] = {
        "n_layers": args.layers, "d_model": args.width, "context": args.context, "batch_size": args.batch,
        "n_steps": args.steps, "eval_every_steps": max(1, args.steps // 6), "device": args.device,
    }  # fmt: skip
    # All models and prices of a seed before the next seed.
    configs = [
        TextRunConfig(model=model, seed=seed, read_price=price, **sizes)  # type: ignore[arg-type]
        for seed in args.seeds
        for model in args.models
        for price in (args.prices if model == "cram" else args.prices[:1])
    ]
    documents = [(document.name, document.text) for document in read_corpus("stdlib").documents]
    text = dataclasses.replace(prepare(documents, args.out, configs[0].vocab_size), tokenizer=None)  # type: ignore[arg-type]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(one, config, text, args.out, deadline) for config in configs]
        unfinished = [reason for run in runs if (reason := run.result()) is not None]
    print("\n".join(unfinished), file=sys.stderr)
    return 3 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
