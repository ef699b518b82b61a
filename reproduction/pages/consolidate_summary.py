"""The short tables of docs/consolidate.md: rows selected from the records behind docs/tables/consolidate.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from reproduction.pages.consolidate import Row, curves, increase
from reproduction.pages.markdown import table

COMPARED = ("gate", "layers")  # learned skipping and the best static rule
RULES = {("gate", 0.75), ("gate", 0.9), ("layers", 0.75), ("layers", 0.9), ("closed form", 0.75), ("random", 0.75),
         ("gate, no adapters", 0.75), ("window", 1.0)}  # fmt: skip


def sections(results: Path) -> dict[str, str]:
    """Returns the text of docs/consolidate.md by the name in its marks.

    Args:
        results: folder of the records, such as `results/consolidate`.
    """
    smollm2 = results / "smollm2"
    compared = [_load(path) for path in sorted(smollm2.glob("comparison*.json"))]
    folders = [*sorted(smollm2.glob("p*")), results / "smollm2-two-cores"]
    return {
        "rules": curves(_load(smollm2 / "comparison.json"), RULES),
        "texts": texts(compared),
        "bounds": table(
            ("folder", "bound, nats per token", "far reads skipped", "increase, nats per token", "causal pairs scored",
             "planted numbers kept", "earlier lines kept"),
            [bound(folder) for folder in folders],
        ),
    }  # fmt: skip


def texts(compared: list[Row]) -> str:
    """Table of what the same thresholds cost on each text and at each length, beside the best static rule."""
    rows = []
    for data in sorted(compared, key=lambda data: (data["text"]["name"] == "prose", _context(data))):
        found = {(row["rule"], row["asked"]): row for row in data["rows"]}
        cells = [f"{_skipped(found[rule, share])}: {increase(found[rule, share])}"
                 for share in (0.75, 0.9) for rule in COMPARED]  # fmt: skip
        rows.append([f"{data['text']['name']}, {_context(data):,} tokens", *cells])
    columns = [f"{name}, about {share}" for share in ("3/4", "9/10") for name in ("**consolidated**", "whole layers")]
    return table(["text (share skipped: increase)", *columns], rows)


def bound(folder: Path) -> list[str]:
    """Cells of a calibrated folder: its bound, its test, and what retrieval keeps of the original's right answers."""
    data = _load(folder / "consolidation.json")
    test, certified = data["test"], data["promise"]["increase"]
    name = f"p{round(certified * 100):02d}"
    retrieval = next(path for at in (folder, folder.parent) if (path := at / f"retrieval-{name}.json").exists())
    kept = []
    for models in _load(retrieval)["kinds"].values():
        right = {model: np.array(found["right"]) for model, found in models.items()}
        kept.append(f"{right['consolidated'][right['original']].sum()} of {right['original'].sum()}")
    place = "two cores" if folder.name.endswith("two-cores") else "accelerator"
    increased = f"{test['increase']:+.4f} ± {test['standard_error']:.4f}"
    shares = [f"{test[name]:.1%}" for name in ("skipped_frac", "pairs_frac")]
    return [f"{place}, {data['config']['context']:,} tokens", f"{certified:g}", shares[0], increased, shares[1], *kept]


def _load(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8"))


def _context(data: Row) -> int:
    return data.get("context", data["config"]["context"])


def _skipped(row: Row) -> str:
    return f"{np.mean(row['skipped_frac']):.0%}"
