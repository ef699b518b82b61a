"""Renews docs/tables/language.md, its figure and its short table in docs/results.md from results/text.

python -m reproduction.pages.text
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from reproduction.pages import markdown
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]
PAGE, RESULTS_PAGE = ROOT / "docs" / "tables" / "language.md", ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "figures" / "text.svg"


def spread(values: list[float], digits: int) -> str:
    """Mean; with minimum and maximum if there are several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(records: list[dict[str, Any]]) -> str:
    """A row for each model and price, by the share of tokens that attend, most first."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        config = record["config"]
        groups[config["model"], config["read_price"] if config["model"] == "cram" else None].append(record)
    rows = []
    for (model, price), found in groups.items():
        last = [record["series"][-1] for record in found]
        share = [row["attention_frac"] for row in last]
        layers = [
            statistics.fmean(layer) for layer in zip(*(row["attention_frac_by_layer"] for row in last), strict=True)
        ]
        cells = [
            model, "" if price is None else f"{price:g}", f"{found[0]['config']['learning_rate']:g}",
            ", ".join(str(r["config"]["seed"]) for r in found),
            spread([row["nats_per_token"] for row in last], 3), spread(share, 4),
            f"{min(layers):.3f} to {max(layers):.3f}", f"{last[0]['n_tokens']:,}", f"{found[0]['n_parameters']:,}",
        ]  # fmt: skip
        rows.append((statistics.fmean(share), cells))
    columns = [
        "model", "price, nats", "rate", "seeds", "nats per token, held-out", "attention_frac", "by layer", "tokens",
        "parameters",
    ]  # fmt: skip
    return markdown.table(columns, (cells for _, cells in sorted(rows, reverse=True)))


def short_table(records: list[dict[str, Any]]) -> str:
    """Model, price, loss and share of tokens that attend: some columns of `table`."""
    head, _, *lines = table(records).splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    kept = [names.index(name) for name in ("model", "price, nats", "nats per token, held-out", "attention_frac")]
    cells = [[line.strip("|").split("|")[i].strip() for i in kept] for line in lines]
    return markdown.table([names[i] for i in kept], cells)


def tuning_table(records: list[dict[str, Any]]) -> str:
    """Table of the loss at each learning rate, by model."""
    rates = sorted({record["config"]["learning_rate"] for record in records})
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for record in records:
        config = record["config"]
        found[config["model"]][config["learning_rate"]] = record["series"][-1]["nats_per_token"]
    columns = [f"tuned by {records[0]['config']['n_steps']} steps, nats on validation text at a rate of"]
    return markdown.table(
        [*columns, *(f"{rate:g}" for rate in rates)],
        [
            [model, *(f"{nats[rate]:.3f}" if rate in nats else "" for rate in rates)]
            for model, nats in sorted(found.items(), key=lambda item: min(item[1].values()))
        ],
    )


def draw(records: list[dict[str, Any]]) -> None:
    """Held-out loss against attention_frac: a point a run, and the means of CRAM by price joined by a line."""
    mpl.rcParams["svg.hashsalt"] = "cramlab"
    figure, axis = plt.subplots(figsize=(6, 3.6))
    groups: dict[str, dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        last = record["series"][-1]
        point = last["attention_frac"], last["nats_per_token"]
        groups[record["config"]["model"]][record["config"]["read_price"]].append(point)
    for model, prices in groups.items():
        points = [point for found in prices.values() for point in found]
        dots = axis.scatter(*zip(*points, strict=True), s=18, label=model)
        means = sorted(tuple(map(statistics.fmean, zip(*found, strict=True))) for found in prices.values())
        axis.plot(*zip(*means, strict=True), color=dots.get_facecolor()[0], linewidth=1)
    axis.set(xlabel="attention_frac", ylabel="nats per token, held-out")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


def read(results: Path) -> list[dict[str, Any]]:
    """Records of all runs, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "text").glob("*.json"))]


def of_part(records: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Records of the runs that were scored on a part of the text: "validation" or "test"."""
    return [record for record in records if record["config"]["part"] == part]


def section(records: list[dict[str, Any]]) -> str:
    """Losses on test text, then those of the tuning runs."""
    tuning = of_part(records, "validation")
    return "\n".join([table(of_part(records, "test")), *([tuning_table(tuning)] if tuning else [])])


if __name__ == "__main__":
    found = read(ROOT / "results")
    renew(PAGE, {"text": section(found)})
    renew(RESULTS_PAGE, {"language models": short_table(of_part(found, "test"))})
    draw(of_part(found, "test"))
