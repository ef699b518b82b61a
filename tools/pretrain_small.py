"""Trains the small models whose redundancy is followed over training; see docs/audit.md.

python tools/pretrain_small.py runs/checkpoints --seeds 0 1 --steps 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cramlab.audit import read_corpus
from cramlab.hf.pretrain import PretrainConfig, prepare, pretrain

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("out", type=Path, help="folder of the runs")
parser.add_argument("--mixers", nargs="+", default=["attention", "cram"], choices=["attention", "cram"])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
parser.add_argument("--steps", type=int, default=PretrainConfig().n_steps)
args = parser.parse_args()

torch.set_num_threads(1)
documents = [(document.name, document.text) for document in read_corpus("stdlib").documents]
text = prepare(documents, args.out, PretrainConfig().vocab_size)
for seed in args.seeds:
    for mixer in args.mixers:
        if not list((args.out / f"{mixer}-seed{seed}").glob(f"step-{args.steps:06d}/step.json")):
            pretrain(PretrainConfig(mixer=mixer, seed=seed, n_steps=args.steps), text, args.out, print)
