"""Trains the small models whose redundancy is followed over training; see docs/audit.md.

python -m reproduction.protocols.pretrain_small runs/checkpoints --seeds 0 1 --set n_steps=1000
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from cramlab.auditing import read_corpus
from cramlab.config import overridden
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText, prepare
from cramlab.language_model.training import run_text

SMALL = TextRunConfig(
    vocab_size=1024, context=128, n_layers=3, d_model=64, learning_rate=2e-3, warmup_steps=50, encoding_frac=0.25,
    read_price=0.02, n_checkpoints=7,
)  # fmt: skip


def one(config: TextRunConfig, text: PreparedText, out: Path) -> None:
    """Trains one model on one core; an accelerator multiplies in TF32."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    run_text(config, text, out, lambda line: print(line, file=sys.stderr, flush=True))


def main() -> None:
    """Trains the models that are not finished, `--jobs` at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--models", nargs="+", default=["gpt2", "cram"], help="models by name; see TextRunConfig")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="field of TextRunConfig")
    parser.add_argument("--held-out-frac", type=float, default=0.1, metavar="F", help="share of documents held out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once, one process each")
    args = parser.parse_args()

    config = overridden(dataclasses.replace(SMALL, device=args.device), args.set)
    configs = [dataclasses.replace(config, model=model, seed=seed) for model in args.models for seed in args.seeds]
    documents = [(document.name, document.text) for document in read_corpus("stdlib").documents]
    text = prepare(documents, args.out, config.vocab_size, args.held_out_frac)
    context = multiprocessing.get_context("spawn")  # an accelerator does not survive a fork
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for running in [pool.submit(one, config, text, args.out) for config in configs]:
            running.result()


if __name__ == "__main__":
    main()
