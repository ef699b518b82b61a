"""The subcommands `eval`, `cost` and `report`, which read finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cramlab.cli.arguments import consolidation_in, existing, page_of, run_folder
from cramlab.cli.cost import print_cost
from cramlab.errors import UsageError


def add_eval(commands: Any) -> None:
    """Adds the subcommand `eval`."""
    parser = commands.add_parser(
        "eval",
        help="measure trained runs again from their checkpoints",
        description="Loads each run under DIR from its checkpoint and measures it on the test split with the "
        "routing rule that decoding uses. Changes no file.",
    )
    parser.add_argument("dir", type=existing("DIR"), metavar="DIR", help="a run's folder, or a folder of runs")
    parser.set_defaults(command=_eval)


def add_cost(commands: Any) -> None:
    """Adds the subcommand `cost`."""
    parser = commands.add_parser(
        "cost",
        help="where a trained model's compute goes",
        description="Measures how many tokens a run's model reads and writes on its validation split, and prints the "
        "FLOPs, parameter and state bytes that follow, layer by layer and part by part, with the length below which "
        "full attention is cheaper. Changes no file.",
    )
    parser.add_argument(
        "dir", type=run_folder("DIR", "config.json", "checkpoint.pt"), metavar="DIR", help="a run's folder"
    )
    parser.set_defaults(command=_cost)


def add_report(commands: Any) -> None:
    """Adds the subcommand `report`."""
    parser = commands.add_parser(
        "report",
        help="one self-contained HTML page from records",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draws attention, retrieval, losses, routing and forecasts of all records found, and the table\n"
        "with intervals over seeds. For a folder of cramlab consolidate, makes its page again, without the model.\n"
        "The page needs no network.",
        epilog="examples:\n  cramlab report runs/mine results --out page.html\n  cramlab report runs/less",
    )
    parser.add_argument(
        "dirs", type=existing("DIR"), nargs="+", metavar="DIR",
        help="run folders, folders of records, records, or one folder of a consolidation",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=page_of("--out"), metavar="PAGE.html",
        help="where to write the page (default for a consolidation: report.html in its folder)",
    )  # fmt: skip
    parser.set_defaults(command=_report)


def _eval(args: argparse.Namespace) -> None:
    folders = sorted(path.parent for path in args.dir.rglob("checkpoint.pt")) if args.dir.is_dir() else []
    if not folders:
        raise UsageError(f"DIR {args.dir} holds no checkpoint.pt; give a run's folder or a folder of runs")
    from rich.console import Console
    from rich.table import Table

    from cramlab.training.evaluate import evaluate_checkpoint

    table = Table("run", "metric", "value")
    for folder in folders:
        name, metrics = evaluate_checkpoint(folder)
        for metric, value in metrics.items():
            text = f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)
            table.add_row(name, metric, text)
        table.add_section()
    Console().print(table)


def _cost(args: argparse.Namespace) -> None:
    print_cost(args.dir)


def _report(args: argparse.Namespace) -> None:
    if len(args.dirs) == 1 and (folder := consolidation_in(args.dirs[0])) is not None:
        _report_consolidation(folder, args.out)
        return
    if args.out is None:
        raise UsageError("--out is missing; give the page to write, as in --out page.html")
    from rich.console import Console
    from rich.progress import Progress

    from cramlab import records

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        found = records.read_all(args.dirs, lambda files: bar.track(files, description="reading records"))
        from cramlab.files import write_text  # drawing takes seconds to import, and a refusal need not wait for it
        from cramlab.report.page import render

        page = render(found, lambda runs: bar.track(runs, description="drawing runs"))
    write_text(args.out, page)
    print(f"report: {args.out}")


def _report_consolidation(folder: Path, out: Path | None) -> None:
    from cramlab.consolidation.folder import load_record
    from cramlab.consolidation.in_use import load_in_use
    from cramlab.files import write_text
    from cramlab.report.consolidation_page import PAGE, render_consolidation

    record = load_record(folder)
    page = folder / PAGE if out is None else out
    write_text(page, render_consolidation(record, load_in_use(folder, record)))
    print(f"report: {page}")
