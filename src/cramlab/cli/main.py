"""The `cramlab` command: run, eval, cost, report, audit, consolidate, irregular, ls, show."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cramlab import records
from cramlab.catalog import MIXERS
from cramlab.cli.arguments import folder_of, page_of, path_of, whole
from cramlab.cli.audit import add_audit
from cramlab.cli.consolidate import add_consolidate
from cramlab.cli.cost import print_cost
from cramlab.cli.irregular import add_irregular
from cramlab.cli.progress import ProgressDisplay, most_tokens
from cramlab.config import nearest, overridden
from cramlab.errors import CramlabError, UsageError
from cramlab.experiments import EXPERIMENTS, Study
from cramlab.files import write_text
from cramlab.report.page import render
from cramlab.report.tables import results_table
from cramlab.tasks.srcd import SIZES
from cramlab.terminal import plain
from cramlab.training.evaluate import evaluate_checkpoint
from cramlab.training.jobs import run_jobs
from cramlab.training.ray_jobs import run_jobs_on_ray

ENGINES = {"local": run_jobs, "ray": run_jobs_on_ray}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 (failed, or ended by Ctrl-C or SIGTERM) or 2 (bad usage)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need be no text
    args = None
    try:
        with _ending_like_ctrl_c():
            args = _parser().parse_args(argv)
            args.command(args)
            sys.stdout.flush()
    except CramlabError as error:
        return _said(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at the end
    except OSError as error:
        return _said(str(error), CramlabError.exit_code)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _said(f"out of memory ({error}); smaller sizes need less", CramlabError.exit_code)
    except KeyboardInterrupt:
        can_resume = hasattr(args, "resume")
        return _said("interrupted" + "; the same command with --resume continues" * can_resume, CramlabError.exit_code)
    return 0


def _said(message: str, code: int) -> int:
    """Prints why a command ends, in one line."""
    print(f"cramlab: {plain(' '.join(message.splitlines()))}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _ending_like_ctrl_c() -> Iterator[None]:
    """SIGTERM ends what is done here as Ctrl-C does: files are left whole, and other processes end too."""
    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cramlab",
        description="How much of a model's attention is really needed, and can it learn to need less?",
        epilog="start with: cramlab run srcd --size small --seed 0 --out runs/first",
    )
    parser.add_argument("--version", action="version", version=f"cramlab {importlib.metadata.version('cramlab')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train the runs of an experiment and write their records",
        description="Trains every run of an experiment, a few at a time, one core each. Each run gets a folder "
        "MIXER-seedN under --out with config.json, checkpoint.pt and, at the end, record.json. Some experiments have "
        "several rounds, in which later runs depend on earlier records; killed at any moment, --resume continues.",
        epilog="examples: cramlab run srcd --size small --out runs/a | cramlab run srcd/cram --size tiny --out runs/b "
        "--set model.mixer.semantic.rank=64 --set training.max_steps=200",
    )
    run.add_argument(
        "name", metavar="NAME", help="experiment, or EXPERIMENT/MIXER,MIXER... for some mixers (see cramlab ls)"
    )
    run.add_argument("--size", default="small", metavar="S", help="tiny, small, medium or paper (default: small)")
    run.add_argument(
        "--seed",
        type=whole("--seed", 0, 2**32 - 1),
        metavar="I",
        help="of data, weights and sampling (default: the experiment's own seeds)",
    )
    run.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the runs")
    run.add_argument("--resume", action="store_true", help="continue interrupted runs, keep finished ones")
    run.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides",
        help="change a field of every run's config, as shown by cramlab show; may be repeated, in any order",
    )  # fmt: skip
    run.add_argument(
        "--jobs",
        type=whole("--jobs", 1, 1024),
        default=2,
        metavar="J",
        help="runs at a time, one core each (default: 2)",
    )
    run.add_argument(
        "--engine", choices=ENGINES, default="local",
        help="where the runs go: processes of this machine, or a Ray cluster that shares --out (default: local)",
    )  # fmt: skip
    run.set_defaults(command=_run)

    evaluate = commands.add_parser(
        "eval",
        help="measure trained runs again from their checkpoints",
        description="Loads each run under DIR from its checkpoint and measures it on the test split with the "
        "routing rule that decoding uses. Changes no file.",
    )
    evaluate.add_argument("dir", type=path_of("DIR"), metavar="DIR", help="a run's folder, or a folder of runs")
    evaluate.set_defaults(command=_eval)

    cost = commands.add_parser(
        "cost",
        help="where a trained model's compute goes",
        description="Measures how many tokens a run's model reads and writes on its validation split, and prints the "
        "FLOPs, parameter and state bytes that follow, layer by layer and part by part, with the length below which "
        "full attention is cheaper. Changes no file.",
    )
    cost.add_argument("dir", type=path_of("DIR"), metavar="DIR", help="a run's folder")
    cost.set_defaults(command=lambda args: print_cost(args.dir))

    report = commands.add_parser(
        "report",
        help="one self-contained HTML page from records",
        description="Draws attention, retrieval, losses, routing and forecasts of all records found, and the table "
        "with intervals over seeds. The page needs no network.",
    )
    report.add_argument(
        "dirs", type=path_of("DIR"), nargs="+", metavar="DIR", help="run folders, folders of records, or records"
    )
    report.add_argument(
        "--out", type=page_of("--out"), required=True, metavar="PAGE.html", help="where to write the page"
    )
    report.set_defaults(command=_report)

    add_audit(commands)
    add_irregular(commands)
    add_consolidate(commands)

    ls = commands.add_parser("ls", help="list experiments, sizes and mixers", description="Lists every name.")
    ls.set_defaults(command=_ls)

    show = commands.add_parser(
        "show",
        help="print the configs of an experiment, or a record",
        description="Prints every field of the runs of an experiment with its --set path, or a record's figures.",
    )
    show.add_argument("name", metavar="NAME", help="experiment or EXPERIMENT/MIXER; or the path of a record")
    show.add_argument("--size", default="small", metavar="S", help="tiny, small, medium or paper (default: small)")
    show.set_defaults(command=_show)
    return parser


def _study(name: str, size: str, seed: int | None) -> Study:
    """The runs that a NAME stands for, round by round."""
    experiment, slash, listed = name.partition("/")
    if experiment not in EXPERIMENTS:
        raise UsageError(f'experiment "{experiment}" is unknown{nearest(experiment, EXPERIMENTS)}')
    if size not in SIZES:
        raise UsageError(f'--size "{size}" is unknown{nearest(size, SIZES)}')
    mixers = listed.split(",") if slash else None
    for i, mixer in enumerate(mixers or ()):
        if mixer not in MIXERS:
            raise UsageError(f'mixer "{mixer}" is unknown{nearest(mixer, MIXERS)}')
        if mixer in listed.split(",")[:i]:
            raise UsageError(f'mixer "{mixer}" is named twice; name it once')
    return EXPERIMENTS[experiment](size=size, seed=seed, mixers=mixers)


def _run(args: argparse.Namespace) -> None:
    for assignment in args.overrides:
        if (field := assignment.partition("=")[0]) in ("experiment", "size", "mixer", "seed", "variant"):
            raise UsageError(f"--set {field} would mislabel the run; use NAME, --size or --seed")
    study = _study(args.name, args.size, args.seed)
    configs = [overridden(config, args.overrides) for config in next(study)]
    while True:
        with ProgressDisplay({config.name: most_tokens(config) for config in configs}) as display:
            found = ENGINES[args.engine](configs, args.out, resume=args.resume, n_jobs=args.jobs, progress=display)
        display.console.print(results_table(found))
        try:
            configs = [overridden(config, args.overrides) for config in study.send(found)]
        except StopIteration:
            return


def _eval(args: argparse.Namespace) -> None:
    folders = sorted(path.parent for path in args.dir.rglob("checkpoint.pt")) if args.dir.is_dir() else []
    if not folders:
        raise records.RecordError(f"{args.dir} holds no checkpoint.pt; give a run's folder or a folder of runs")
    table = Table("run", "metric", "value")
    for folder in folders:
        name, metrics = evaluate_checkpoint(folder)
        for metric, value in metrics.items():
            text = f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)
            table.add_row(name, metric, text)
        table.add_section()
    Console().print(table)


def _report(args: argparse.Namespace) -> None:
    write_text(args.out, render([records.read(path) for path in records.find(args.dirs)]))
    print(f"report: {args.out}")


def _ls(_: argparse.Namespace) -> None:
    print("experiments")
    for name, experiment in EXPERIMENTS.items():
        print(f"  {name:14}{(experiment.__doc__ or '').splitlines()[0]}")
    print(f"sizes\n  {'  '.join(SIZES)}")
    print(f"mixers\n  {'  '.join(MIXERS)}")


def _show(args: argparse.Namespace) -> None:
    if args.name.partition("/")[0] not in EXPERIMENTS and Path(args.name).exists():
        found = [records.read(path) for path in records.find([Path(args.name)])]
        Console().print(results_table(found))
        return
    for config in next(_study(args.name, args.size, seed=0)):  # later rounds depend on records
        print(f"# {config.experiment}/{config.mixer}, size {config.size}")
        for path, value in _leaves(config):
            print(f"{path} = {value}")


def _leaves(config: object, prefix: str = "") -> list[tuple[str, object]]:
    """Every field that --set can change, with its path."""
    assert dataclasses.is_dataclass(config)
    leaves: list[tuple[str, object]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves += _leaves(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple) and not any(map(dataclasses.is_dataclass, value)):
            leaves.append((f"{prefix}{field.name}", ",".join(map(str, value))))
        elif isinstance(value, tuple):
            leaves += [(f"# {prefix}{field.name}[{i}], set by the size", item) for i, item in enumerate(value)]
        else:
            leaves.append((f"{prefix}{field.name}", value))
    return leaves


if __name__ == "__main__":
    sys.exit(main())
