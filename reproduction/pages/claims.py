"""Collects records of the experiments behind docs/claims.md and renews that page, its tables and figures.

    python -m reproduction.pages.claims runs/results results

takes every finished record under runs/results to its place under results/, like collect_results.py, and documents of
`cramlab irregular` to results/irregular/; then rewrites docs/claims.md and
docs/tables/claims.md between their marks, and the figures.
For the latter alone:

    python -m reproduction.pages.claims results
"""

from __future__ import annotations

import sys
from pathlib import Path

from cramlab import records
from cramlab.auditing import AuditResult, over_training
from cramlab.files import write_json, write_text
from reproduction.claims.evidence import Evidence
from reproduction.claims.findings import Findings
from reproduction.claims.page import figures, sections, tables
from reproduction.collect_results import collect
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]
PAGE, TABLES = ROOT / "docs" / "claims.md", ROOT / "docs" / "tables" / "claims.md"


def evidence(results: Path) -> Evidence:
    """Everything under a folder of results but the runs of size quick, which are a first look."""
    runs = [run for run in records.read_all([results]) if run["size"] != "quick"]
    audits = {
        path.parent.name: AuditResult.read(path).data for path in sorted((results / "audit").glob("*/audit.json"))
    }
    training = results / "audit" / "over_training" / over_training.FILE
    return Evidence(
        runs=[run for run in runs if run["status"] == "finished" and run["metrics"]["test"] is not None],
        audits=audits,
        over_training=over_training.read(training) if training.exists() else None,
        irregular=[records.read_json(path) for path in sorted((results / "irregular").rglob("*.json"))],
    )


def collect_irregular(runs: Path, results: Path) -> None:
    """Copies the documents of `cramlab irregular`."""
    for path in sorted(runs.rglob("irregular.json")):
        document = records.read_json(path)
        parts = (document["model"], document.get("way"), f"seed{document['seed']}")
        name = "-".join(part for part in parts if part) + ".json"
        write_json(results / "irregular" / document["data"]["name"] / name, document)


def main() -> None:
    """Collects, then renews page and figures."""
    results = Path(sys.argv[-1])
    if len(sys.argv) == 3:
        for new in collect(Path(sys.argv[1]), results):
            print(new)
        collect_irregular(Path(sys.argv[1]), results)
    found = Findings.of(evidence(results))
    renew(PAGE, sections(found))
    renew(TABLES, tables(found))
    for name, text in figures(found).items():
        write_text(ROOT / "docs" / "figures" / name, text)


if __name__ == "__main__":
    main()
