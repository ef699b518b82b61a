"""Renews docs/drift.md from the records in results/drift: `python -m reproduction.pages.drift`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cramlab import records
from reproduction import goals
from reproduction.drift_goals import KNOWN, ROOT, TEXT, TOPIC, cram_records, rows
from reproduction.pages import drift_cram
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

PAGE = ROOT / "docs" / "drift.md"
Row = Mapping[str, Any]


def sections() -> dict[str, str]:
    """The text between each pair of marks."""
    found = rows()
    text = records.read_json(TEXT)
    return {"false alarms": false_alarms(found), "delays": delays(found), "groups": groups(found),
            "stream": stream(text), "rungs": rungs(text), "cram": drift_cram.section(cram_records()),
            "known size": known_size(records.read_json(KNOWN)["rows"]),
            "goals": goals.render(TOPIC)}  # fmt: skip


def stream(record: Row) -> str:
    """Table of streams of text under a guard, a line for each phase."""
    setting, names = record["setting"], {"before": "text", "turned": "turn", "back": "text"}
    lines = []
    for name, _, n_tokens in setting["phases"]:
        row, late = record["phases"][name], record["phases"][name]["median_tokens_to_alarm"]
        lines.append((
            f"{setting[names[name]]}, {n_tokens:,} tokens", f"{row['streams_with_alarm']} of {setting['streams']}",
            "-" if late is None else f"{late:,.0f}", f"{row['mean_rung']:.2f}", f"{row['skipped_frac']:.1%}",
            f"{row['increase']:+.4f}",
        ))  # fmt: skip
    columns = ("phase", "streams with an alarm", "median tokens to the first", "steps down by its end",
               "far reads skipped", "loss increase, nats per token")  # fmt: skip
    return table(columns, lines)


def rungs(record: Row) -> str:
    """Table of what the audits found on each rung, by text."""
    lines = [
        (f"{r['skipped_asked']:.0%}", r["text"], f"{r['documents']}", f"{r['skipped_frac']:.1%}",
         f"{r['increase']:+.4f}", f"{r['change']:.4f}")
        for r in record["rungs"]
    ]  # fmt: skip
    bound = record["setting"]["change_bound"]
    columns = ("rung", "text", "documents", "far reads skipped", "loss increase, nats per token",
               f"change of a token, nats (bound by the reference: {bound:.4f})")  # fmt: skip
    return table(columns, lines)


def false_alarms(found: list[dict[str, Any]]) -> str:
    """Table of streams without a change that had an alarm."""
    lines = [
        (_name(r), f"{r['alpha']:g}", f"{r['before']:g}", f"{r['alarms']:,} of {r['streams']:,}",
         "{:.2%} to {:.2%}".format(*r["interval"]))
        for r in found if r["what"] == "false alarms"
    ]  # fmt: skip
    return table(("test", "alpha", "wrong without a change", "streams with an alarm", "95% interval"), lines)


def delays(found: list[dict[str, Any]]) -> str:
    """Table of delays in audited reads: a line for each test and alpha, a column for each size of change."""
    of = {(_name(r), r["alpha"], r["rho"]): r for r in found if r["what"] == "delay"}
    rhos = sorted({rho for _, _, rho in of})
    alphas = sorted({alpha for _, alpha, _ in of}, reverse=True)
    lines = []
    for alpha in alphas:
        names = dict.fromkeys(name for name, own, _ in of if own == alpha)
        least = [f"{of[next(iter(names)), alpha, rho]['least_reads']:.1f}" for rho in rhos]
        lines.append((f"{alpha:g}", "*least of any test*", *least))
        lines += [(f"{alpha:g}", name, *(_delay(of[name, alpha, rho]) for rho in rhos)) for name in names]
    return table(("alpha", "test", *(f"rho = {rho:g}" for rho in rhos)), lines)


def _delay(row: Row) -> str:
    """Mean delay; what was not noticed by the end of the stream counts up to there, and is said."""
    late = f" ({row['unnoticed'] / row['streams']:.0%} unnoticed)" if row["unnoticed"] else ""
    return f"{row['reads']:.1f}{late}"


def known_size(found: list[dict[str, Any]]) -> str:
    """Table of the delay of CUSUM, which knows the size of the change, beside the test's and the least."""
    ours = {(r["alpha"], r["rho"]): r["reads"] for r in rows() if r["test"] == "betting" and r["what"] == "delay"}
    lines = [
        (f"{r['alpha']:g}", f"{r['rho']:g}", f"{r['least_reads']:.1f}", f"{r['reads']:.1f}",
         f"{ours[r['alpha'], r['rho']]:.1f}", f"{r['reads'] / r['least_reads']:.2f}")
        for r in found
    ]  # fmt: skip
    columns = ("alpha", "rho", "least of any test", "CUSUM, size known", "betting", "CUSUM / least")
    return table(columns, lines)


def groups(found: list[dict[str, Any]]) -> str:
    """Table of which of 100 patterns are named."""
    lines = [
        (f"{r['alpha']:g}", f"{r['stale_patterns']}", f"{r['reads']:.1f}", f"{r['named_frac']:.1%}",
         f"{r['reads_per_named_pattern']:.1f}", f"{r['wrongly_named']} of {r['streams']}")
        for r in found if r["what"] == "local"
    ]  # fmt: skip
    columns = ("alpha", "stale patterns of 100", "audited reads to the alarm", "stale patterns named by the end",
               "audited reads of a pattern until it is named", "streams with a wrong name")  # fmt: skip
    return table(columns, lines)


def _name(row: Row) -> str:
    return f"{row['test']} ({row['parameters']})" if row.get("parameters") else str(row["test"])


if __name__ == "__main__":
    renew(PAGE, sections())
    if found := cram_records():
        drift_cram.draw(found)
    print(PAGE.relative_to(ROOT))
