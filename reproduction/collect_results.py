"""Copies finished records into results/ and renews the tables and figures that are made from them.

    python -m reproduction.collect_results runs/results results

takes every run's record.json under runs/results to results/EXPERIMENT/SIZE/MIXER-seedN.json, then rewrites the tables
between their marks in README.md and docs/results.md and the figures in docs/figures/. For the latter alone:

    python -m reproduction.collect_results results results
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.experiments.srcd_table import BUDGET_TOKENS
from cramlab.files import write_text
from cramlab.report.tables import markdown_table, origin
from reproduction.claims import practice_rows
from reproduction.pages import srcd_plots as benchmark_plots
from reproduction.pages.srcd_tables import benchmark_table, goals_table, sweep_table

ROOT = Path(__file__).parents[1]
COMPLETE = ("srcd",)  # experiments whose records keep everything that `cramlab report` draws
ROW = ("step", "n_tokens", "train_reads_frac", "quality")
VALIDATION = ("retrieval_acc", "retrieval_acc_recurring", "retrieval_acc_novel", "attention_frac", "n_tokens")


def collect(runs: Path, results: Path) -> list[Path]:
    """Copies every finished record in short form; returns the new files."""
    written = []
    for path in sorted(runs.rglob("record.json")):
        record = records.read(path)
        if record["status"] == "finished":
            parts = (record["mixer"], record.get("variant"), f"seed{record['seed']}")
            name = "-".join(part for part in parts if part) + ".json"
            written.append(results / record["experiment"] / record["size"] / name)
            records.write(written[-1], short(record))
    return written


def short(record: dict[str, Any]) -> dict[str, Any]:
    """A record with what pages, figures and claims read.

    Rows of the series without a validation are left out, and numbers of the others are rounded to six digits. Outside
    `COMPLETE`, rows keep `ROW` and `VALIDATION`, there are no samples, and the practice log stays where claim C7 reads
    it. Tuning runs, which no claim rests on, keep neither series nor practice log.
    """
    series = [_rounded(row) for row in record["series"] if row["validation"] is not None]
    if record["experiment"] in COMPLETE:
        return record | {"series": series}
    tuning = record["metrics"]["test"] is None
    rows = [_only(row, ROW) | {"validation": _only(row["validation"], VALIDATION)} for row in series]
    practice = record.get("practice") if practice_rows.is_read(record) and not tuning else None
    return record | {"series": [] if tuning else rows, "samples": [], "practice": practice}


def _only(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def _rounded(value: Any) -> Any:
    """Numbers to six digits."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(results: Path, *, tuning: bool = False) -> list[dict[str, Any]]:
    """All records of a folder, or none; those of tuning runs only if wanted."""
    if not results.is_dir():
        return []
    found = [records.read(path) for path in records.find([results])]
    return [record for record in found if tuning or record["metrics"]["test"] is not None]


def tables(results: Path) -> dict[str, str]:
    """The text between each pair of marks, by the name in the marks."""
    made = {"results": markdown_table(main) if (main := read(results / "srcd")) else ""}
    found, goals = list(main), {}
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
    made["deep"] = markdown_table(deep) if deep else "No records yet.\n"
    made["sweeps"] = sweep_table(sweep) if sweep else "No records yet.\n"
    made["results"] += "\n" + origins(main)
    made["origins"] = origins(found + deep + sweep)
    return made


def origins(found: list[dict[str, Any]]) -> str:
    """Where records come from, a line each."""
    return "".join(f"- {line}\n" for line in sorted({origin(record) for record in found}))


def figures(results: Path) -> dict[str, str]:
    """SVG text by file name."""
    table, sweep = read(results / "srcd_table" / "small"), read(results / "srcd_sweeps" / "small")
    drawn = {}
    if table:
        drawn["pareto.svg"] = benchmark_plots.pareto(table)
        drawn["attention.svg"] = benchmark_plots.attention_by_mixer(table)
        drawn["length.svg"] = benchmark_plots.longer_sequences(table)
    recurrence = [record for record in sweep if record["variant"].startswith("recurring_frac")]
    if recurrence:
        drawn["recurrence.svg"] = benchmark_plots.recurrence_sweep(recurrence)
    return drawn


def renewed(page: str, made: dict[str, str], name: str) -> str:
    """A page's text with what stands between its marks replaced."""
    for mark, text in made.items():
        begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
        if begin not in page:
            continue
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{name} lacks the mark {end}; put it back where the table ends")
        page = f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"
    return page


def main() -> None:
    """Collects, then renews pages and figures."""
    runs, results = Path(sys.argv[1]), Path(sys.argv[2])
    if runs != results:
        for new in collect(runs, results):
            print(new)
    made = tables(results)
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        write_text(page, renewed(page.read_text(encoding="utf-8"), made, page.name))
    for name, svg in figures(results).items():
        write_text(ROOT / "docs" / "figures" / name, svg)


if __name__ == "__main__":
    main()
