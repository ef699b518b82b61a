"""Renews the figures of docs/consolidate.md, which stand between marks, from the records in results/consolidate.

python tools/consolidate_tables.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cramlab.files import write_text

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "consolidate.md", ROOT / "results" / "consolidate"
RULES = {
    "gate": "**consolidated**",
    "oracle": "error oracle (with the adapters)",
    "random": "random tokens (with the adapters)",
    "layers": "whole layers, least valuable first (with the adapters)",
    "heads": "whole heads, least valuable first (window, no adapters)",
    "dropped": "whole sub-layers dropped by cosine",
    "linear": "whole sub-layers replaced by a linear map",
    "gate, no adapters": "our gate, window alone",
    "benefit gate": "gate that regresses the benefit",
    "window": "window everywhere, no adapters",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def _curves(data: dict[str, Any]) -> str:
    """Means over documents, with standard errors."""
    order = list(RULES)
    rows = []
    for row in sorted(data["rows"], key=lambda r: (order.index(r["rule"]), r["asked"])):
        increase = np.array(row["increase"])
        error = increase.std(ddof=1) / len(increase) ** 0.5
        skipped = f"{np.mean(row['skipped_frac']):.3f}"
        rows.append([RULES[row["rule"]], skipped, f"{increase.mean():+.4f} ± {error:.4f}"])
    return table(["rule", "far reads skipped", "increase, nats per token"], rows)


def _made(data: dict[str, Any]) -> str:
    config, header, text = data["config"], data["header"], data["text"]
    ranks, explained = data["ranks"], data["explained"]
    lines = [
        f"{data['name']} on {text['name']} ({text['version']}), contexts of {config['context']:,} tokens, window",
        f"{config['window']} and {config['n_sinks']} first tokens; {data['documents']} test documents, original loss",
        f"{np.mean(data['original']):.3f}. Adapters: ranks {min(ranks)} to {max(ranks)}, mean {np.mean(ranks):.1f};",
        f"of the far read's squared length they predict, on held-out text, {np.mean(explained):.2f} (layers:",
        f"{min(explained):.2f} to {max(explained):.2f}). torch {header['versions']['torch']}; code",
        f"{header['revision']}; {header['date']}.",
    ]
    if "deviation" in data:
        lines.append(f"Deviation from the config, for want of time: {data['deviation']}.")
    return " ".join(lines)


def _calibration(data: dict[str, Any]) -> str:
    rows = [[f"{t['skipped_frac']:.0%}", f"{t['mean']:+.4f}", f"{t['upper_bound']:.4f}", f"{t['p_value']:.3g}",
             str(t["n_capped"])] for t in data["tested"]]  # fmt: skip
    head = ["share to skip", "increase on calibration documents", "could be promised", "p", "documents capped"]
    return table(head, rows)


def _retrieval(data: dict[str, Any]) -> str:
    rows = []
    for kind, models in data["kinds"].items():
        for who, found in models.items():
            rows.append([kind, who, f"{sum(found['right'])}/{len(found['right'])}", f"{np.mean(found['nats']):.3f}"])
    return table(["asked for", "model", "right", "nats per token of the answer"], rows)


def _decode(data: dict[str, Any]) -> str:
    rows = []
    for name, step in data["steps"].items():
        (median, low, high), (ratio, worst, best) = step["seconds"], step["faster"]
        milliseconds = f"{median * 1e3:.0f} [{low * 1e3:.0f}, {high * 1e3:.0f}]"
        rows.append([name, milliseconds, f"{ratio:.2f} [{worst:.2f}, {best:.2f}]"])
    return table([f"one token at {data['context']:,}", "ms [10%, 90%]", "times as fast as the original"], rows)


def sections() -> dict[str, str]:
    """The text between each pair of marks; of the records that there are."""
    made = {"comparison": (_made, _curves), "consolidation": (_calibration,), "retrieval": (_retrieval,),
            "decode": (_decode,)}  # fmt: skip
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for make in made[path.stem]:
            found[f"{path.parent.name} {make.__name__.lstrip('_')}"] = make(data)
    return found


def renewed(text: str) -> str:
    """The page with everything between its marks made anew; a mark without a record is an error."""
    made = sections()
    first, *parts = text.split("<!-- ")
    page = [first]
    for part in parts:
        mark, _, rest = part.partition(" -->")
        page.append(f"<!-- end -->{rest}" if mark == "end" else f"<!-- {mark} -->\n\n{made[mark]}\n\n")
    return "".join(page)


if __name__ == "__main__":
    write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8")))
