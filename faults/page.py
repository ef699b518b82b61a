"""Renews the tables in docs/reliability.md from the records: `python -m faults.page`."""

from __future__ import annotations

import collections
import json
from typing import Any

from cramlab.files import write_text
from faults.campaign import ROOT
from faults.goals import GOALS, found

PAGE = ROOT / "docs" / "reliability.md"
SHOWN_FAILURES = 30


def main() -> None:
    """Replaces what stands between the marks."""
    write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8")))
    print(PAGE.relative_to(ROOT))


def renewed(page: str) -> str:
    """A page's text with its tables as the records have them."""
    for name, text in tables().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, first, rest = page.partition(begin)
        _, second, after = rest.partition(end)
        if not first or not second:
            raise ValueError(f"{PAGE.name} lacks the marks {begin} and {end}; put them back")
        page = f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"
    return page


def tables() -> dict[str, str]:
    """The text between each pair of marks."""
    records = {name: record for name, record in found().items() if name != "speed"}
    return {
        "tried": _tried(records), "failures": _failures(records), "goals": _goals(), "origin": _origin(records),
    }  # fmt: skip


def _tried(records: dict[str, dict[str, Any]]) -> str:
    lines = ["| test | tried | failed |", "| --- | --- | --- |"]
    for record in records.values():
        lines += [f"| {row['test']} | {row['tried']:,} | {row['failed']:,} |" for row in record["tests"]]
    tried, failed = (sum(record[name] for record in records.values()) for name in ("tried", "failed"))
    return "\n".join([*lines, f"| **all** | **{tried:,}** | **{failed:,}** |"])


def _failures(records: dict[str, dict[str, Any]]) -> str:
    failures = [(part, failure) for part, record in records.items() for failure in record["failures"]]
    if not failures:
        return "Nothing failed."
    counts = collections.Counter(failure["fault"] for _, failure in failures)
    lines = [f"{len(failures):,} tries failed: " + ", ".join(f"{n} x {fault}" for fault, n in counts.items()) + "."]
    lines += ["", "| part | case | fault | what was seen |", "| --- | --- | --- | --- |"]
    for part, failure in failures[:SHOWN_FAILURES]:
        cells = [part, failure["case"], failure["fault"], failure["message"]]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    if len(failures) > SHOWN_FAILURES:
        lines += ["", f"The first {SHOWN_FAILURES} are shown; the records hold all."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that is no Markdown, in a table."""
    safe = "".join(character if character.isprintable() else "?" for character in text)
    return safe.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")[:160]


def _goals() -> str:
    lines = ["| goal | target | reached | 95% interval of the rate | met |", "| --- | --- | --- | --- | --- |"]
    for goal in json.loads(GOALS.read_text(encoding="utf-8")):
        interval = "" if goal["interval"] is None else "{:.4g} to {:.4g}".format(*goal["interval"])
        met = "yes" if goal["met"] else "**no**"
        lines.append(f"| {goal['goal']} | {goal['target']} | {goal['reached']:,} | {interval} | {met} |")
    return "\n".join(lines)


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
