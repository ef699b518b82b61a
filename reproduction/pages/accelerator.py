"""The accelerator's section of docs/tables/performance.md, from the records of `benchmarks.accelerator`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Found = dict[str, dict[str, Any]]
_METHOD = (
    "Ways are timed in turn between CUDA events, with what the caches then hold: medians, 10th and 90th percentile. "
    "Those below 2 ms are called ten times in a row."
)


def read(folder: Path) -> Found:
    """Records of a folder by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def section(folder: Path) -> str:
    """Goals and figures reached, then all measurements; a sentence if nothing was measured."""
    found = read(folder)
    if not found:
        return "Not measured yet."
    header = next(iter(found.values()))
    device = header["hardware"]["accelerator"] or "no accelerator, a dry run"
    lines = [f"{device}, torch {header['versions']['torch']}, {header['date']}. {_METHOD}", "", *_checks(found)]
    lines += ["", "| what | goal | reached | bottleneck |", "| --- | --- | --- | --- |"]
    lines += [f"| {what} | {goal} | {reached} | {binds} |" for what, goal, reached, binds in goals(found)]
    lines += ["", *_rows(found)]
    failed = [f"- `{name}`: {record['failed']}" for name, record in found.items() if "failed" in record]
    for name, record in found.items():
        failed += [f"- `{name}`, {way}: {said}" for way, said in record.get("failed_ways", {}).items()]
    return "\n".join([*lines, *(["", "Not measured, or not to the end:", "", *failed] if failed else [])])


def _checks(found: Found) -> list[str]:
    lines = [
        "| check | largest difference, as a share of the size of what is expected | allowed | holds |",
        "| --- | --- | --- | --- |",
    ]
    for name, record in found.items():
        if "differences" in record:
            differences = {what: math.inf if v is None else v for what, v in record["differences"].items()}
            worst = max(differences, key=differences.__getitem__)
            said = f"{differences[worst]:.1e} ({worst})"
            if record.get("left_out"):
                said += f"; {record['left_out']:.1%} of the tokens, at the gate's threshold, left out"
            lines.append(f"| {name} | {said} | {record['tolerance']:.0e} | {'yes' if record['holds'] else 'no'} |")
    kernels = sorted({record["chosen"] for record in found.values() if "chosen" in record})
    return [*lines, "", f"Dense attention is PyTorch's {', '.join(kernels)}."] if kernels else lines


def _ms(record: dict[str, Any], way: str) -> float:
    return record["ways"][way]["ms"]["median"]


def goals(found: Found) -> list[tuple[str, str, str, str]]:
    """Returns rows of measurement, goal, figure reached, bottleneck."""
    specified = [
        (f"episodic tier, 1.6% read, {n:,} tokens, batch {b}", times, f"tier-{n}-by-{b}", "dense", "routed")
        for n, times in ((16384, 20), (65536, 40))
        for b in (1, 8)
    ]
    specified += [
        (f"layer, training step, 16,384 tokens, batch {b}", 3, f"training-16384-by-{b}", "transformer", "cram")
        for b in (1, 8)
    ]
    specified += [
        (
            f"... bounded, compiled or not, batch {b}",
            3,
            f"compiled_training-16384-by-{b}",
            "transformer",
            "cram, bounded",
        )
        for b in (1, 8)
    ]
    lines = []
    for what, times, name, base, ours in specified:
        record = found.get(name, {"failed": "not run"})
        if "failed" in record:
            lines.append((what, f"{times}x", "not measured", record["failed"]))
            continue
        said = f"{best_ms(record, base) / best_ms(record, ours):.1f}x"
        if f"{ours}, as a graph" in record["ways"]:
            said += f" (launch by launch {_ms(record, base) / _ms(record, ours):.1f}x)"
        lines.append((what, f"{times}x", said, _what_binds(found, record, ours)))
    return [*lines, *_decode(found)]


def best_ms(record: dict[str, Any], way: str) -> float:
    """Returns the time of the fastest way to do the same, in ms: launch by launch, compiled, or as a graph."""
    names = (f"{way}{how}{graph}" for how in ("", ", in place", ", compiled") for graph in ("", ", as a graph"))
    return min(_ms(record, name) for name in names if name in record["ways"])


def _decode(found: Found) -> list[tuple[str, str, str, str]]:
    """Rows on a decoded token, launch by launch and as a graph, beside the Llama's best way."""
    records = {n: found[f"decode-{n}"] for n in (1024, 16384, 65536) if "ways" in found.get(f"decode-{n}", {})}
    lines = []
    for way in ("cram", "cram, as a graph"):
        each = {n: _ms(r, way) / r["n_steps"] for n, r in records.items() if way in r["ways"]}
        what = "decode, a token, four layers" + way.removeprefix("cram")
        if len(each) < 2:
            lines.append((what, "flat", "not measured", ""))
            continue
        said = ", ".join(f"{ms:.3f} ms at {n:,}" for n, ms in each.items())
        first, *_, last = each.values()
        llama = ", ".join(f"{best_ms(records[n], 'llama') / records[n]['n_steps']:.3f}" for n in each)
        binds = f"launches; the Llama's best way takes {llama} ms"
        lines.append((what, "flat", f"{said}: {last / first:.2f} times as long", binds))
    return lines


def _what_binds(found: Found, record: dict[str, Any], way: str) -> str:
    """Describes the bottleneck: launches, if a graph is much faster; and how much of the time its least work takes."""
    graph, said = f"{way}, as a graph", []
    if graph in record["ways"] and _ms(record, way) > 1.3 * _ms(record, graph):
        said.append(
            f"launches, unless recorded as a graph ({_ms(record, way):.3f} against {_ms(record, graph):.3f} ms)"
        )
    best = graph if graph in record["ways"] else way
    least = _least_ms(found, record, way)
    if least is not None:
        said.append(f"least work takes {least:.3f} of {_ms(record, best):.3f} ms")
    return "; ".join(said)


def _least_ms(found: Found, record: dict[str, Any], way: str) -> float | None:
    ceilings = found.get("ceilings", {})
    least = record.get("least", {}).get(way.removesuffix(", as a graph"))
    if least is None or "failed" in ceilings or not ceilings:
        return None
    seconds = least["flops"] / ceilings["product_flops_per_s"], least["bytes"] / ceilings["copy_bytes_per_s"]
    return 1e3 * max(seconds)


def _place(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["what"], record.get("n_batch", 1), record["n_tokens"], record.get("read_frac", 0.0)


def _rows(found: Found) -> list[str]:
    """All ways of all rows, by kind and length."""
    lines = [
        "| what | tokens | batch | read | way | ms | times faster | least work, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    records = [record for record in found.values() if record.get("ways")]
    for record in sorted(records, key=_place):
        for way, measured in record["ways"].items():
            least = _least_ms(found, record, way)
            cells = [
                record["what"], f"{record['n_tokens']:,}", str(record.get("n_batch", 1)),
                f"{record['read_frac']:.1%}" if "read_frac" in record else "", way,
                *("{median:,.3f} [{p10:,.3f}, {p90:,.3f}]".format(**measured[key]) for key in ("ms", "speedup")),
                "" if least is None else f"{least:,.3f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines
