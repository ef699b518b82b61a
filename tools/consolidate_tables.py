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
    "lora": "consolidated, with recovery by LoRA (another backbone)",
    "closed form": "adapters and gates in closed form, no gradients",
    "local": "after gradients on each layer's error",
    "end": "after gradients on the end loss",
    "oracle": "error oracle (with the adapters)",
    "random": "random tokens (with the adapters)",
    "layers": "whole layers, least valuable first (with the adapters)",
    "heads": "whole heads, least valuable first (window, no adapters)",
    "dropped": "whole sub-layers dropped by cosine",
    "linear": "whole sub-layers replaced by a linear map",
    "gate, no adapters": "our gate, window alone",
    "benefit gate": "linear gate that regresses the benefit",
    "router only": "gates alone by gradients, window alone (router-only tuning)",
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
        f"{data['name']} on {text['name']} ({text['version']}), contexts of {data.get('context', config['context']):,} "
        "tokens, window",
        f"{config['window']} and {config['n_sinks']} first tokens; {data['documents']} test documents, original loss",
        f"{np.mean(data['original']):.3f}. Adapters: ranks {min(ranks)} to {max(ranks)}, mean {np.mean(ranks):.1f};",
        f"of the far read's squared length they predict, on held-out text, {np.mean(explained):.2f} (layers:",
        f"{min(explained):.2f} to {max(explained):.2f}). {_learned(data)}torch {header['versions']['torch']}; code",
        f"{header['revision']}; {header['date']}.",
    ]
    if "deviation" in data:
        lines.append(f"Deviation from the config, for want of time: {data['deviation']}.")
    return " ".join(lines)


def _learned(data: dict[str, Any]) -> str:
    """What the gradient steps came to; "" for a record without."""
    if not data.get("gradients", {}).get("losses"):
        return ""
    config, found = data["config"], data["gradients"]
    losses = found["losses"].get("end")
    text = f"Gradients: {config['local_steps']} local and {config['end_steps']} end steps of {config['batch_contexts']}"
    text += f" contexts, {config['units']} units, {data['bytes'] / 1e6:.1f} MB in all; "
    if losses:
        text += (
            f"end loss ({config['end_loss']}) {losses[0]:.4f} in the first twentieth, {losses[-1]:.4f} in the last; "
        )
    looked = ", ".join(f"{name} {value:+.4f}" for name, value in found["validation"].items())
    accelerator = data["header"]["hardware"]["accelerator"] or "CPU"
    return f"{text}validation chose {found['chosen']} ({looked}). {accelerator}; "


def _calibration(data: dict[str, Any]) -> str:
    rows = [[f"{t['skipped_frac']:.0%}", f"{t['mean']:+.4f}", f"{t['upper_bound']:.4f}", f"{t['p_value']:.3g}",
             str(t["n_capped"])] for t in data["tested"]]  # fmt: skip
    head = ["share to skip", "increase on calibration documents", "could be promised", "p", "documents capped"]
    return table(head, rows)


def _retrieval(data: dict[str, Any]) -> str:
    rows = [["all", "share of far reads skipped", f"{data['skipped_frac']:.3f}", ""]]
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
        for make in made[path.stem.partition("-")[0]]:
            where = path.stem.partition("-")[2]
            found[" ".join(filter(None, (path.parent.name, make.__name__.lstrip("_"), where)))] = make(data)
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
