"""Renews table and figure of language models in docs/performance.md from results/text (see `text_run.py`)."""

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
FIGURE = ROOT / "docs" / "figures" / "text.svg"


def spread(values: list[float], digits: int) -> str:
    """Mean, and least and greatest of several."""
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
        "model", "price, nats", "rate", "seeds", "nats a token, held out", "attention_frac", "by layer", "tokens",
        "parameters",
    ]  # fmt: skip
    return markdown.table(columns, (cells for _, cells in sorted(rows, reverse=True)))


def tuning_table(records: list[dict[str, Any]]) -> str:
    """What each learning rate came to, by model, and the steps of these runs."""
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
    axis.set(xlabel="attention_frac", ylabel="nats a token, held out")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Reads every record, writes page and figure."""
    paths = sorted((ROOT / "results" / "text").glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    tuning = [record for record in records if record["config"]["part"] == "validation"]
    tested = [record for record in records if record["config"]["part"] == "test"]
    tables = "\n".join([table(tested), *([tuning_table(tuning)] if tuning else [])])
    renew(ROOT / "docs" / "performance.md", {"text": tables})
    draw(tested)


if __name__ == "__main__":
    main()
