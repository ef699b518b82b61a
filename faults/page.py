"""Renews the tables in docs/reliability.md from the records: `python -m faults.page`."""

from __future__ import annotations

import collections
from typing import Any

from faults.campaign import ROOT
from faults.goals import TOPIC, found
from reproduction import goals
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

PAGE = ROOT / "docs" / "reliability.md"
SHOWN_FAILURES = 30


def main() -> None:
    """Replaces what stands between the marks."""
    renew(PAGE, tables())
    print(PAGE.relative_to(ROOT))


def tables() -> dict[str, str]:
    """The text between each pair of marks."""
    records = {name: record for name, record in found().items() if name != "speed"}
    return {
        "tried": _tried(records), "failures": _failures(records), "goals": goals.render(TOPIC),
        "origin": _origin(records),
    }  # fmt: skip


def _tried(records: dict[str, dict[str, Any]]) -> str:
    rows = [
        (row["test"], f"{row['tried']:,}", f"{row['failed']:,}")
        for record in records.values()
        for row in record["tests"]
    ]
    tried, failed = (sum(record[name] for record in records.values()) for name in ("tried", "failed"))
    return table(("test", "tried", "failed"), [*rows, ("**all**", f"**{tried:,}**", f"**{failed:,}**")])


def _failures(records: dict[str, dict[str, Any]]) -> str:
    failures = [(part, failure) for part, record in records.items() for failure in record["failures"]]
    if not failures:
        return "Nothing failed."
    counts = collections.Counter(failure["fault"] for _, failure in failures)
    lines = [f"{len(failures):,} tries failed: " + ", ".join(f"{n} x {fault}" for fault, n in counts.items()) + "."]
    rows = [
        [_cell(cell) for cell in (part, failure["case"], failure["fault"], failure["message"])]
        for part, failure in failures[:SHOWN_FAILURES]
    ]
    lines += ["", table(("part", "case", "fault", "what was seen"), rows)]
    if len(failures) > SHOWN_FAILURES:
        lines += [f"The first {SHOWN_FAILURES} are shown; the records hold all."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that is no Markdown, in a table."""
    safe = "".join(character if character.isprintable() else "?" for character in text)
    return safe.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")[:160]


def _origin(records: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, record in records.items():
        machine, versions = record["hardware"], record["versions"]
        lines.append(
            f"- {name}: {record['date']}, {machine['processor']}, {machine['n_cores']} cores, "
            f"{record['seconds'] / 60:.1f} minutes; code {record['revision']} (sources {record['code']}), seed "
            f"{record['seed']}; python {versions['python']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
