"""Tables of docs/results.md and figures of SRCD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.experiments.srcd_table import BUDGET_TOKENS
from cramlab.files import write_text
from cramlab.report.tables import origin
from reproduction.pages import srcd_plots
from reproduction.pages.renew import renew
from reproduction.pages.srcd_tables import benchmark_table, goals_table, results_table, sweep_table

ROOT = Path(__file__).parents[2]


def read(results: Path, *, tuning: bool = False) -> list[dict[str, Any]]:
    """All records of a folder, which may be missing; those of tuning runs only on request."""
    if not results.is_dir():
        return []
    return [record for record in records.read_all([results]) if tuning or record["metrics"]["test"] is not None]


def tables(results: Path) -> dict[str, str]:
    """Text of docs/results.md by the name in its marks."""
    made = {}
    found, goals = read(results / "srcd"), {}
    for size in ("small", "medium", "paper"):
        rows = read(results / "srcd_table" / size)
        made[f"table {size}"] = (
            benchmark_table(rows, budget_tokens=BUDGET_TOKENS[size]) if rows else "No records yet.\n"
        )
        found += rows
        if rows:
            goals[size] = rows
    made["goals"] = goals_table(goals) if goals else "No records yet.\n"
    deep, sweep = read(results / "srcd_deep"), read(results / "srcd_sweeps")
    made["deep"] = results_table(deep) if deep else "No records yet.\n"
    made["sweeps"] = sweep_table(sweep) if sweep else "No records yet.\n"
    made["origins"] = origins(found + deep + sweep)
    return made


def origins(found: list[dict[str, Any]]) -> str:
    """Date, machine and versions of records, a line each."""
    return "".join(f"- {line}\n" for line in sorted({origin(record) for record in found}))


def figures(results: Path) -> dict[str, str]:
    """SVG text by file name."""
    table, sweep = read(results / "srcd_table" / "small"), read(results / "srcd_sweeps" / "small")
    drawn = {}
    if table:
        drawn["pareto.svg"] = srcd_plots.pareto(table)
        drawn["attention.svg"] = srcd_plots.attention_by_mixer(table)
        drawn["length.svg"] = srcd_plots.longer_sequences(table)
    recurrence = [record for record in sweep if record["variant"].startswith("recurring_frac")]
    if recurrence:
        drawn["recurrence.svg"] = srcd_plots.recurrence_sweep(recurrence)
    return drawn


def renew_page(results: Path) -> None:
    """Rewrites the page and figures from the records under `results`."""
    renew(ROOT / "docs" / "results.md", tables(results))
    for name, svg in figures(results).items():
        write_text(ROOT / "docs" / "figures" / name, svg)
