"""Renews docs/performance.md, docs/tables/performance.md and their figure from the records.

python -m reproduction.pages.performance
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from reproduction.pages import accelerator as accelerator_page
from reproduction.pages import markdown, performance_summary
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
SUMMARY, TABLES = ROOT / "docs" / "performance.md", ROOT / "docs" / "tables" / "performance.md"
FIGURE = ROOT / "docs" / "figures" / "performance.svg"


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown: milliseconds, and how many times faster than the first way of the row."""
    rows = []
    for row in found:
        for name, way in row["ways"].items():
            cells = [row["what"], f"{row['n_tokens']:,}", f"{row['read_frac']:.1%}" if "read_frac" in row else "", name]
            cells += ["{median:,.2f} [{p10:,.2f}, {p90:,.2f}]".format(**way[what]) for what in ("ms", "speedup")]
            rows.append(cells)
    return markdown.table(("what", "tokens", "read", "way", "ms", "times faster"), rows)


def timings() -> list[dict[str, Any]]:
    """Rows of the benchmark on a CPU."""
    return json.loads((RESULTS / "bench" / "execution.json").read_text(encoding="utf-8"))["rows"]


def sections() -> dict[str, str]:
    """Text of docs/tables/performance.md by the name in its marks: all measurements."""
    accelerator = accelerator_page.section(RESULTS / "bench" / "accelerator")
    return {"bench": table(timings()), "accelerator": accelerator}


def draw(found: list[dict[str, Any]]) -> None:
    """Draws milliseconds by length, and those of the scores by the share of tokens that read."""
    mpl.rcParams["svg.hashsalt"] = "cramlab"
    names = [name for name in dict.fromkeys(r["row"] for r in found) if name != "share"]
    names += ["share"] if any(r["row"] == "share" for r in found) else []
    columns = 3
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(12, 3.2 * -(-len(names) // columns)))
    for axis, name in zip(axes.flat, names, strict=False):
        rows = [r for r in found if r["row"] == name]
        x = [r["read_frac"] if name == "share" else r["n_tokens"] for r in rows]
        for way in rows[0]["ways"]:
            spread = [r["ways"][way]["ms"] for r in rows]
            axis.plot(x, [s["median"] for s in spread], marker="o", markersize=3, label=way)
            axis.fill_between(x, [s["p10"] for s in spread], [s["p90"] for s in spread], alpha=0.2)
        axis.set(
            xscale="log",
            yscale="log",
            title=rows[0]["what"] + (f" at {rows[0]['n_tokens']:,} tokens" if name == "share" else ""),
            xlabel="share of tokens that read" if name == "share" else "tokens",
            ylabel="ms",
        )
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    renew(SUMMARY, performance_summary.sections(RESULTS))
    renew(TABLES, sections())
    draw(timings())
