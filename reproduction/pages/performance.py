"""Renews the tables in docs/performance.md and draws docs/performance.svg, from what is in results/bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from reproduction.pages import accelerator as accelerator_page
from reproduction.pages import markdown
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown: milliseconds, and how many times faster than the first way of the row."""
    rows = []
    for row in found:
        for name, way in row["ways"].items():
            cells = [row["what"], f"{row['n_tokens']:,}", f"{row['read_frac']:.1%}" if "read_frac" in row else "", name]
            cells += ["{median:,.2f} [{p10:,.2f}, {p90:,.2f}]".format(**way[what]) for what in ("ms", "speedup")]
            rows.append(cells)
    return markdown.table(("what", "tokens", "read", "way", "ms", "times faster"), rows)


def main() -> None:
    """Milliseconds by length, and scores by share of tokens that read."""
    mpl.rcParams["svg.hashsalt"] = "cramlab"
    found = json.loads((ROOT / "results" / "bench" / "execution.json").read_text(encoding="utf-8"))["rows"]
    accelerator = accelerator_page.section(ROOT / "results" / "bench" / "accelerator")
    renew(ROOT / "docs" / "performance.md", {"bench": table(found), "accelerator": accelerator})
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
    figure.savefig(ROOT / "docs" / "performance.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
