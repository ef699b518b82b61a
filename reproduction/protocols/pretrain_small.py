"""Trains the small models whose redundancy is followed over training; see docs/audit.md.

python -m reproduction.protocols.pretrain_small runs/checkpoints --seeds 0 1 --set n_steps=1000
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from cramlab.auditing import read_corpus
from cramlab.config import overridden
from cramlab.language_model.pretrain import PretrainConfig, finished, prepare, pretrain


def started() -> None:
    """One core a training; TF32 where an accelerator multiplies."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")


def main() -> None:
    """Trains what is not finished under the folder, `--jobs` at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--mixers", nargs="+", default=["attention", "cram"], choices=["attention", "cram"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of PretrainConfig")
    parser.add_argument("--held-out-frac", type=float, default=0.1, metavar="F", help="share of documents kept back")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once, one process each")
    args = parser.parse_args()

    config = overridden(PretrainConfig(), args.set)
    documents = [(document.name, document.text) for document in read_corpus("stdlib").documents]
    text = prepare(documents, args.out, config.vocab_size, args.held_out_frac)
    configs = [dataclasses.replace(config, mixer=mixer, seed=seed) for mixer in args.mixers for seed in args.seeds]
    left = [c for c in configs if not finished(c, text, args.out)]
    context = multiprocessing.get_context("spawn")  # an accelerator does not survive a fork
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=started) as pool:
        for running in [pool.submit(pretrain, c, text, args.out, print, args.device) for c in left]:
            running.result()


if __name__ == "__main__":
    main()
