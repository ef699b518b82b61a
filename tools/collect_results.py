"""Copies finished records into results/ and renews the tables in README.md that are made from them.

    python tools/collect_results.py runs/results results

takes runs/results/EXPERIMENT/SIZE/MIXER-seedN/record.json to results/EXPERIMENT/SIZE/MIXER-seedN.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cramlab import records
from cramlab.files import write_text
from cramlab.report.tables import markdown_table, origin

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def collect(runs: Path, results: Path) -> list[Path]:
    """Copies every finished record; returns the new files."""
    written = []
    for path in sorted(runs.rglob("record.json")):
        record = records.read(path)
        if record["status"] == "finished":
            parts = (record["mixer"], record.get("variant"), f"seed{record['seed']}")
            name = "-".join(part for part in parts if part) + ".json"
            written.append(results / record["experiment"] / record["size"] / name)
            records.write(written[-1], record)
    return written


def tables(results: Path) -> str:
    """The text that stands between the marks in README.md."""
    found = [records.read(path) for path in records.find([results / "srcd"])]
    origins = sorted({origin(record) for record in found})
    return markdown_table(found) + "\n" + "\n".join(f"- {line}" for line in origins) + "\n"


def renew(page: Path, text: str) -> None:
    """Replaces what stands between the marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}; put them back where the table belongs")
    write_text(page, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    runs_folder, results_folder = Path(sys.argv[1]), Path(sys.argv[2])
    for new in collect(runs_folder, results_folder):
        print(new)
    renew(Path("README.md"), tables(results_folder))
