"""The short tables of docs/performance.md: rows selected from the records behind docs/tables/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reproduction.pages import accelerator, consolidate, markdown

Row = dict[str, Any]
LENGTHS = (512, 1024, 4096, 16384, 65536)  # tokens
CONSOLIDATED = "decode-8192-p05.json"
CONSOLIDATED_WAYS = {"decode": ("original", "growing cache", "consolidated", "no far reads"),
                     "prompt": ("original", "consolidated")}  # fmt: skip


def sections(results: Path) -> dict[str, str]:
    """Returns the table of each topic by the name in its marks.

    Args:
        results: folder of the records, such as `results/`.
    """
    rows = json.loads((results / "bench" / "execution.json").read_text(encoding="utf-8"))["rows"]
    found = accelerator.read(results / "bench" / "accelerator")
    decoded = json.loads((results / "consolidate" / "smollm2" / CONSOLIDATED).read_text(encoding="utf-8"))
    return {
        "layer": layer(rows),
        "training": training(rows),
        "decoding": decoding(rows),
        "accelerator": accelerated(found),
        "consolidated": consolidated(decoded),
        "language models": language_models(found),
    }


def _by_length(rows: list[Row], name: str) -> dict[int, Row]:
    return {row["n_tokens"]: row for row in rows if row["row"] == name}


def _times(way: Row) -> str:
    return "{median:.1f} [{p10:.1f}, {p90:.1f}]".format(**way["speedup"])


def layer(rows: list[Row]) -> str:
    """Speed of the scores, the episodic memory and the whole layer relative to full attention, by length."""
    scores, tier, whole = (_by_length(rows, name) for name in ("scores", "tier", "layer"))
    columns = ("tokens", "transformer layer, ms", "CRAM layer, ms", "layer, times as fast",
               "episodic memory, times as fast", "scores, times as fast")  # fmt: skip
    return markdown.table(
        columns,
        [
            [f"{n:,}", *(f"{whole[n]['ways'][way]['ms']['median']:,.0f}" for way in ("transformer", "cram")),
             _times(whole[n]["ways"]["cram"]), *(_times(found[n]["ways"]["routed"]) for found in (tier, scores))]
            for n in LENGTHS
        ],
    )  # fmt: skip


def training(rows: list[Row]) -> str:
    """Times of a training step of one layer, by length."""
    found = _by_length(rows, "training")
    columns = ("tokens", "transformer, ms", "CRAM, ms", "times as fast", "times as fast with a tenth audited")
    return markdown.table(
        columns,
        [
            [f"{n:,}", *(f"{found[n]['ways'][way]['ms']['median']:,.0f}" for way in ("transformer", "cram")),
             *(_times(found[n]["ways"][way]) for way in ("cram", "cram, a tenth audited"))]
            for n in LENGTHS
        ],
    )  # fmt: skip


def decoding(rows: list[Row]) -> str:
    """Times of a decoded token and sizes of the state, by context."""
    found = _by_length(rows, "decode")
    lines = []
    for n in (n for n in LENGTHS if n in found):
        row = found[n]
        times = [row["ways"][way]["ms"]["median"] / row["n_steps"] for way in ("llama", "cram")]
        sizes = [row["state_bytes"][way] / 2**20 for way in ("llama", "cram")]
        lines.append([f"{n:,}", *(f"{ms:.1f}" for ms in times), _times(row["ways"]["cram"]),
                      *(f"{size:.1f}" for size in sizes)])  # fmt: skip
    columns = ("context", "Llama, ms", "CRAM, ms", "times as fast", "Llama's cache, MiB", "CRAM's state, MiB")
    return markdown.table(columns, lines)


def accelerated(found: accelerator.Found) -> str:
    """The goals of one layer on an accelerator and what was reached."""
    goals = [[what, goal, reached] for what, goal, reached, _ in accelerator.goals(found) if goal != "flat"]
    return markdown.table(("what", "goal", "reached"), goals)


def consolidated(data: Row) -> str:
    """Times of a consolidated model and of its original."""
    chosen = {
        what: data[what] | {"ways": {way: data[what]["ways"][way] for way in ways}}
        for what, ways in CONSOLIDATED_WAYS.items()
    }
    return consolidate.decode(data | chosen)


def language_models(found: accelerator.Found) -> str:
    """Times of a decoded token of four layers on an accelerator, by context."""
    lines = []
    for n in LENGTHS:
        record = found.get(f"decode-{n}", {})
        if "ways" not in record:
            continue
        ways = (accelerator.best_ms(record, "llama"), record["ways"]["cram"]["ms"]["median"],
                accelerator.best_ms(record, "cram"))  # fmt: skip
        lines.append([f"{n:,}", *(f"{ms / record['n_steps']:.2f}" for ms in ways), f"{ways[0] / ways[2]:.1f}"])
    columns = ("context", "Llama, its best way, ms", "CRAM, launch by launch, ms", "CRAM, its best way, ms",
               "times as fast")  # fmt: skip
    return markdown.table(columns, lines)
