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
from reproduction.claims.findings import Findings
from reproduction.claims.verdict import Verdict
from reproduction.pages import markdown


def claim_rows(found: Findings) -> list[ClaimRow]:
    """All rows, from C1 to C8."""
    return [
        *audit_rows.rows(found.evidence),
        *table_rows.rows(found.evidence),
        *transition_rows.rows(found.courses),
        *bounds_rows.rows(found.points),
        *transfer_rows.rows(found.transfers),
        *carried_rows.rows(found.carried),
        *practice_rows.rows(found.practice),
        *irregular_rows.rows(found.irregular),
    ]


def hours(evidence: Evidence) -> str:
    """Table of the hours of the runs by experiment and machine, on which as many runs at once as it has cores."""
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


def sections(found: Findings) -> dict[str, str]:
    """Text of docs/claims.md by the name in its marks."""
    rows = claim_rows(found)
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    summary = "; ".join(f"{verdict.strip('*')}: {count}" for verdict, count in counts.items())
    experiments = ("transition", "bounds", "transfer")
    lines = sorted({origin(run) for name in experiments for run in found.evidence.of(name)})
    series = irregular_rows.table(found.irregular)
    if found.irregular:
        series = f"{series}\n![AUC on irregular series](figures/irregular.svg)\n"
    return {
        "claims": markdown.table(COLUMNS, [row.cells() for row in rows]) + f"\nRows: {summary}.\n",
        "carried": carried_rows.table(found.carried) or "No records yet.\n",
        "irregular": series,
        "claims hours": hours(found.evidence),
        "claims origins": "".join(f"- {line}\n" for line in lines) or "No records yet.\n",
    }


def tables(found: Findings) -> dict[str, str]:
    """Text of docs/tables/claims.md by the name in its marks."""
    return {
        "transition": transition_rows.table(found.courses),
        "practice": practice_rows.table(found.practice),
        "bounds": bounds_rows.table(found.points),
        "transfer": transfer_rows.table(found.transfers, found.evidence),
    }


def figures(found: Findings) -> dict[str, str]:
    """SVG text by file name, of the figures that have records."""
    made = {
        "transition.svg": drawings.transition(found.evidence.of("transition")),
        "practice.svg": drawings.practice(found.practice),
        "bounds.svg": drawings.bounds(found.points),
        "transfer.svg": drawings.transfer(found.transfers),
        "transfer_training.svg": drawings.transfer_training(found.transfers),
        "irregular.svg": drawings.irregular(found.irregular),
    }
    return {name: text for name, text in made.items() if text is not None}
