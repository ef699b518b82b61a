"""The subcommands `run`, `ls` and `show`: experiments, by the names of their runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cramlab.cli.arguments import consolidation_in, folder_of, whole
from cramlab.cli.settings import check_run, help_text, split_name, table
from cramlab.errors import UsageError
from cramlab.extensions import MIXERS, TASKS, declared, is_reference

if TYPE_CHECKING:
    from cramlab.experiments import Study


def add_run(commands: Any) -> None:
    """Adds the subcommand `run`."""
    parser = commands.add_parser(
        "run",
        help="train the runs of an experiment and write their records",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains every run of an experiment, a few at a time, one core each. Each run gets a folder\n"
        "MIXER-seedN under --out with config.json, checkpoint.pt and, at the end, record.json. Some experiments\n"
        "have several rounds, in which later runs depend on earlier records; killed at any moment, --resume continues.",
        epilog=help_text(
            "run",
            "cramlab run srcd --size small --out runs/a",
            "cramlab run srcd/cram --size tiny --out runs/b --set model.mixer.semantic.rank=64 "
            "--set training.max_steps=200",
            "cramlab run my_task.py:Task --size quick --out runs/c",
            "cramlab run srcd/cram,my_mixer.py:Config --size quick --out runs/d",
        ),
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="experiment, or a task of your own as FILE.py:CLASS; NAME/MIXER,MIXER... for some mixers, which may be "
        "FILE.py:CLASS too "
        "(see cramlab ls)",
    )
    _add_size(parser)
    parser.add_argument(
        "--seed",
        type=whole("--seed", 0, 2**32 - 1),
        metavar="I",
        help="seed of data, weights and sampling (default: the experiment's own seeds)",
    )
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--resume", action="store_true", help="continue interrupted runs, keep finished ones")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="overrides",
        help="change a field of every run's config, see below; may be repeated, in any order",
    )
    parser.add_argument(
        "--jobs",
        type=whole("--jobs", 1, 1024),
        default=2,
        metavar="J",
        help="runs at a time, one core each (default: 2)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where the runs go: processes of this machine, or a Ray cluster that shares --out (default: local)",
    )
    parser.set_defaults(command=_run)


def add_ls(commands: Any) -> None:
    """Adds the subcommand `ls`."""
    parser = commands.add_parser(
        "ls", help="list experiments, sizes and mixers", description="Lists the names of experiments, sizes and mixers."
    )
    parser.set_defaults(command=_ls)


def add_show(commands: Any) -> None:
    """Adds the subcommand `show`."""
    parser = commands.add_parser(
        "show",
        help="print the configs of an experiment, a record or a consolidation",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prints every field of the runs of an experiment with its --set path, a record's figures, or what\n"
        "a consolidation promises, reads and costs.",
        epilog="examples:\n  cramlab show srcd/cram --size quick\n  cramlab show runs/mine\n  cramlab show runs/less",
    )
    parser.add_argument(
        "name", metavar="NAME",
        help="experiment or EXPERIMENT/MIXER; or the path of a record, or of a folder of records or a consolidation",
    )  # fmt: skip
    _add_size(parser)
    parser.set_defaults(command=_show)


def _add_size(parser: argparse.ArgumentParser) -> None:
    sizes = ", ".join(table()["sizes"])
    parser.add_argument("--size", default="small", metavar="S", help=f"size of the task: {sizes} (default: small)")


def _study(experiment: str, mixers: list[str] | None, size: str, seed: int | None) -> Study:
    """The runs of an experiment, round by round."""
    from cramlab.experiments import EXPERIMENTS
    from cramlab.experiments.own_task import own_study

    if is_reference(experiment):
        return own_study(task=experiment, size=size, seed=seed, mixers=mixers)
    return EXPERIMENTS[experiment](size=size, seed=seed, mixers=mixers)


def _run(args: argparse.Namespace) -> None:
    experiment, mixers = check_run(args.name, args.size, args.overrides)
    from cramlab.cli.progress import ProgressDisplay, most_tokens
    from cramlab.config import overridden
    from cramlab.report.tables import results_table
    from cramlab.training.jobs import run_jobs
    from cramlab.training.ray_jobs import run_jobs_on_ray

    engine = {"local": run_jobs, "ray": run_jobs_on_ray}[args.engine]
    if args.engine == "ray" and any(".py:" in name for name in (experiment, *(mixers or ()))):
        raise UsageError("--engine ray cannot take a class from a file; install it as a package, or use --engine local")
    study = _study(experiment, mixers, args.size, args.seed)
    configs = [overridden(config, args.overrides) for config in next(study)]
    while True:
        with ProgressDisplay({config.name: most_tokens(config) for config in configs}) as display:
            found = engine(configs, args.out, resume=args.resume, n_jobs=args.jobs, progress=display)
        display.console.print(results_table(found))
        try:
            configs = [overridden(config, args.overrides) for config in study.send(found)]
        except StopIteration:
            return


def _ls(_: argparse.Namespace) -> None:
    names = table()
    print("experiments")
    for name, experiment in names["experiments"].items():
        print(f"  {name:14}{experiment['about']}")
    print(f"sizes\n  {'  '.join(names['sizes'])}")
    print(f"mixers\n  {'  '.join(names['mixers'])}")
    for group, title in ((TASKS, "tasks of other packages"), (MIXERS, "mixers of other packages")):
        for i, (name, reference) in enumerate(declared(group).items()):
            print(f"{title}\n" * (i == 0) + f"  {name:14}{reference}")


def _show(args: argparse.Namespace) -> None:
    known = split_name(args.name)[0]
    if known not in table()["experiments"] and not is_reference(known) and Path(args.name).exists():
        if (folder := consolidation_in(Path(args.name))) is not None:
            _show_consolidation(folder)
            return
        from rich.console import Console

        from cramlab import records
        from cramlab.report.tables import results_table

        Console().print(results_table([records.read(path) for path in records.find([Path(args.name)])]))
        return
    experiment, mixers = check_run(args.name, args.size)
    from cramlab.config import leaves

    for config in next(_study(experiment, mixers, args.size, seed=0)):  # later rounds depend on records
        print(f"# {config.experiment}/{config.mixer}, size {config.size}")
        for path, _, value in leaves(config):
            print(f"{path} = {value}")
        for i, stage in enumerate(config.training.stages):
            print(f"# set by the size: training.stages[{i}] = {stage}")


def _show_consolidation(folder: Path) -> None:
    from rich.console import Console

    from cramlab.consolidation.folder import load_record
    from cramlab.consolidation.in_use import load_in_use
    from cramlab.report.consolidation_table import consolidation_table

    record = load_record(folder)
    Console().print(consolidation_table(record, load_in_use(folder, record)))
