"""Trains a CRAM language model beside a Llama of as many parameters and a 1:7 hybrid; see docs/performance.md.

python tools/text_run.py runs/text --prices 0.003 0.01 0.03 --steps 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cramlab.audit import read_corpus
from cramlab.hf.pretrain import prepare
from cramlab.hf.text_run import TextRunConfig, run_text

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("out", type=Path, help="folder of the runs; called again, finished ones are kept")
parser.add_argument("--models", nargs="+", default=["llama", "cram", "hybrid"], choices=["llama", "cram", "hybrid"])
parser.add_argument("--prices", nargs="+", type=float, default=[TextRunConfig().read_price], help="of a read, nats")
parser.add_argument("--seeds", nargs="+", type=int, default=[0])
for name in ("d_model", "n_layers", "context", "batch_size", "n_steps", "eval_every_steps"):
    parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(TextRunConfig(), name))
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.set_num_threads(1)
documents = [(document.name, document.text) for document in read_corpus("stdlib").documents]
text = prepare(documents, args.out, TextRunConfig().vocab_size)
sizes = ("d_model", "n_layers", "context", "batch_size", "n_steps", "eval_every_steps")
for seed in args.seeds:
    for model in args.models:
        for price in args.prices if model == "cram" else args.prices[:1]:
            config = TextRunConfig(
                model=model, seed=seed, read_price=price, device=args.device, **{s: getattr(args, s) for s in sizes}
            )
            run_text(config, text, args.out, print)
