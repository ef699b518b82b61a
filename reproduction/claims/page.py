"""All sections and figures of docs/claims.md, and the tables of docs/tables/claims.md."""

from __future__ import annotations

from typing import Any

from cramlab.report.tables import origin, processor
from reproduction.claims import (
    audit_rows,
    bounds_rows,
    carried_rows,
    drawings,
    irregular_rows,
    practice_rows,
    table_rows,
    transfer_rows,
    transition_rows,
)
from reproduction.claims.evidence import COLUMNS, ClaimRow, Evidence
from reproduction.claims.verdict import Verdict
from reproduction.pages import markdown


def claim_rows(evidence: Evidence) -> list[ClaimRow]:
    """C1 to C8."""
    parts = (audit_rows, table_rows, transition_rows, bounds_rows, transfer_rows, carried_rows, practice_rows,
             irregular_rows)  # fmt: skip
    return [row for part in parts for row in part.rows(evidence)]


def hours(evidence: Evidence) -> str:
    """What the runs took, by experiment and machine: the sum over runs, as many of which at once as it has cores."""
    spent: dict[tuple[str, str, str], list[tuple[float, int | None]]] = {}
    timed: list[tuple[str, str, dict[str, Any], float, int | None]] = [
        (run["experiment"], run["size"], run, run["elapsed_s"], run["n_train_tokens"]) for run in evidence.runs
    ]
    timed += [("irregular", document["data"]["name"], document, document["seconds"], None)
              for document in evidence.irregular]  # fmt: skip
    for experiment, size, document, seconds, n_tokens in timed:
        spent.setdefault((experiment, size, processor(document)), []).append((seconds, n_tokens))
    cells = []
    for key, runs in sorted(spent.items()):
        seconds, tokens = sum(s for s, _ in runs), sum(n or 0 for _, n in runs)
        cells.append((*key, str(len(runs)), f"{seconds / 3600:.1f}", f"{tokens / seconds:,.0f}" if tokens else "-"))
    columns = ("experiment", "size or data", "machine", "runs", "hours, summed over runs", "tokens a second and run")
    return markdown.table(columns, cells) if cells else "No records yet.\n"


def sections(evidence: Evidence) -> dict[str, str]:
    """The text between each pair of marks of docs/claims.md."""
    rows = claim_rows(evidence)
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    summary = "; ".join(f"{verdict.strip('*')}: {count}" for verdict, count in counts.items())
    experiments = ("transition", "bounds", "transfer")
    lines = sorted({origin(run) for name in experiments for run in evidence.of(name)})
    series = irregular_rows.table(evidence)
    if drawings.irregular(evidence) is not None:
        series = f"{series}\n![AUC on irregular series](figures/irregular.svg)\n"
    return {
        "claims": markdown.table(COLUMNS, [row.cells() for row in rows]) + f"\nRows: {summary}.\n",
        "carried": carried_rows.table(evidence) or "No records yet.\n",
        "irregular": series,
        "claims hours": hours(evidence),
        "claims origins": "".join(f"- {line}\n" for line in lines) or "No records yet.\n",
    }


def tables(evidence: Evidence) -> dict[str, str]:
    """The text between each pair of marks of docs/tables/claims.md."""
    parts = {"transition": transition_rows, "practice": practice_rows, "bounds": bounds_rows, "transfer": transfer_rows}
    return {name: part.table(evidence) for name, part in parts.items()}


def figures(evidence: Evidence) -> dict[str, str]:
    """SVG text by file name; only those that there are records for."""
    return drawings.draw(evidence)
