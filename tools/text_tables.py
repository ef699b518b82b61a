"""Renews the table of language models in docs/performance.md from results/text (see `text_run.py`)."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from cramlab.files import write_text

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- text: begin -->", "<!-- text: end -->"


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
            model, "" if price is None else f"{price:g}", ", ".join(str(r["config"]["seed"]) for r in found),
            spread([row["nats_per_token"] for row in last], 3), spread(share, 4),
            f"{min(layers):.3f} to {max(layers):.3f}", f"{last[0]['n_tokens']:,}", f"{found[0]['n_parameters']:,}",
        ]  # fmt: skip
        rows.append((statistics.fmean(share), f"| {' | '.join(cells)} |"))
    head = "| model | price, nats | seeds | nats a token, held out | attention_frac | by layer | tokens | parameters |"
    lines = [row for _, row in sorted(rows, reverse=True)]
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- | --- |", *lines])


def main() -> None:
    """Reads every record, writes the page."""
    paths = sorted((ROOT / "results" / "text").glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    page = ROOT / "docs" / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    write_text(page, f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
