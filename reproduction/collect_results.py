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
from reproduction.claims import practice_rows
from reproduction.pages import readme, srcd

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
    """A record with the fields that pages, figures and claims read.

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
    """Rounds numbers to six digits."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Collects, then renews pages and figures."""
    runs, results = Path(sys.argv[1]), Path(sys.argv[2])
    if runs != results:
        for new in collect(runs, results):
            print(new)
    srcd.renew_page(results)
    readme.write()


if __name__ == "__main__":
    main()
