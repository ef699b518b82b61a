"""Renews docs/consolidate.md, docs/tables/consolidate.md and their curves in docs/figures from results/consolidate.

python -m reproduction.pages.consolidate
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from cramlab.files import write_text
from reproduction.goals import render
from reproduction.pages.consolidation_plots import loss_by_share, mean_and_error
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
PAGE, TABLES = ROOT / "docs" / "consolidate.md", ROOT / "docs" / "tables" / "consolidate.md"
RESULTS = ROOT / "results" / "consolidate"
FIGURES = ROOT / "docs" / "figures"
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


def increase(row: Row) -> str:
    """Mean increase over documents, with its standard error."""
    mean, error = mean_and_error(row["increase"])
    return f"{mean:+.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")


def curves(data: Row, chosen: Container[tuple[str, float]] | None = None) -> str:
    """Table of a comparison: the rows that were chosen, as rule and share asked for, or all."""
    order = list(RULES)
    rows = []
    for row in sorted(data["rows"], key=lambda r: (order.index(r["rule"]), r["asked"])):
        if chosen is None or (row["rule"], row["asked"]) in chosen:
            pairs = np.mean(row["pairs_frac"])  # rules that are only observed score everything
            cells = f"{np.mean(row['skipped_frac']):.3f}", f"{pairs:.3f}" if pairs else "", increase(row)
            rows.append([RULES[row["rule"]], *cells])
    return table(["rule", "far reads skipped", "causal pairs scored", "increase, nats per token"], rows)


def _made(data: Row) -> str:
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


def _learned(data: Row) -> str:
    """Describes steps and losses of the gradients; "" for a record without."""
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


def _promise(data: Row) -> str:
    """Describes the certified bound, and the increase on test documents, by which nothing was chosen."""
    promise, test, config = data["promise"], data["test"], data["config"]
    error = "" if test["standard_error"] is None else f" ± {test['standard_error']:.4f}"
    return (
        f"Certified: at most {promise['increase']:g} nats per token with confidence {1 - promise['delta']:g}, from "
        f"{config['calibration_documents']} calibration documents (increases above {promise['bound']:g} count so). "
        f"Chosen: the threshold for {data['skipped_frac']:.0%}. On {test['documents']} test documents it skips "
        f"{test['skipped_frac']:.1%} of the far reads at {test['increase']:+.4f}{error}, and scores "
        f"{test['pairs_frac']:.1%} of the causal pairs. {_at_lengths(data)}Code {data['revision']}."
    )


def _at_lengths(data: Row) -> str:
    """Describes what the certificate rests on at further lengths; "" where it is for one length."""
    lines = []
    for other in data.get("lengths", []):
        test = other["test"]
        error = "" if test["standard_error"] is None else f" ± {test['standard_error']:.4f}"
        lines.append(
            f"At {other['length']:,} tokens {other['documents']} documents certify it, and {test['documents']} test "
            f"documents skip {test['skipped_frac']:.1%} at {test['increase']:+.4f}{error}. "
        )
    return "".join(lines)


def _calibration(data: Row) -> str:
    rows = [[f"{t['skipped_frac']:.0%}", f"{t['mean']:+.4f}", f"{t['upper_bound']:.4f}", f"{t['p_value']:.3g}",
             str(t["n_capped"])] for t in data["tested"]]  # fmt: skip
    head = ["share to skip", "increase on calibration documents", "certifiable bound", "p", "documents capped"]
    return table(head, rows)


def _retrieval(data: Row) -> str:
    """Table of right answers, and of the original's that are kept, by thirds of the distance to what is asked for."""
    rows = [["all", "share of far reads skipped", f"{data['skipped_frac']:.3f}", "", "", "", ""]]
    for kind, models in data["kinds"].items():
        thirds = np.array_split(np.argsort(data["distance"][kind], kind="stable"), 3)
        right = {who: np.array(found["right"]) for who, found in models.items()}
        for who, found in models.items():
            by_distance = [f"{right[who][third].sum()}/{len(third)}" for third in thirds]
            in_all = f"{right[who].sum()}/{len(right[who])}"
            rows.append([kind, who, in_all, f"{np.mean(found['nats']):.3f}", *by_distance])
        kept = right["consolidated"][right["original"]]
        rows.append([kind, "kept of the original's", f"{kept.sum()}/{len(kept)}", "", "", "", ""])
        distances = np.array(data["distance"][kind])
        spans = [f"{distances[third].min():,} to {distances[third].max():,}" if len(third) else "" for third in thirds]
        rows.append([kind, "tokens back", "", "", *spans])
    head = ["asked for", "model", "right", "nats per token of the answer", "right, nearest third", "middle", "farthest"]
    return table(head, rows)


def decode(data: Row) -> str:
    """Table of the times of one token and of a prompt, in ms, for each way of computing them."""
    rows = []
    for what, unit in (("decode", "one token after"), ("prompt", "a prompt of")):
        found = data.get(what, {"ways": {}})
        for name, way in found["ways"].items():
            cells = ["{median:,.1f} [{p10:,.1f}, {p90:,.1f}]".format(**way["ms"]),
                     "{median:.2f} [{p10:.2f}, {p90:.2f}]".format(**way["speedup"])]  # fmt: skip
            known = name == "consolidated" and found["skipped_frac"] is not None
            skipped = f"{found['skipped_frac']:.1%}" if known else ""
            rows.append([f"{unit} {found['context']:,}", name, skipped, *cells])
    return table(["what", "way", "far reads skipped", "ms [10%, 90%]", "times as fast as the original"], rows)


def sections() -> dict[str, str]:
    """Text of docs/tables/consolidate.md by the name in its marks, one for each record."""
    made = {
        "comparison": (_made, curves),
        "consolidation": (_promise, _calibration),
        "retrieval": (_retrieval,),
        "decode": (decode,),
        "in_use": (),
    }  # measurements in use stand on the report of each folder
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, _, where = path.stem.partition("-")
        for make in made[kind]:
            mark = *path.parent.relative_to(RESULTS).parts, make.__name__.lstrip("_"), where
            found[" ".join(filter(None, mark))] = make(data)
    return found


def tables() -> dict[str, str]:
    """Text of docs/tables/consolidate.md by the name in its marks: that of the records, and the goals."""
    return sections() | {"goals": render("consolidate")}


def figures() -> dict[str, str]:
    """SVG text by file name: the curves of every folder with a comparison, with the thresholds calibrated below it."""
    drawn = {}
    for folder in sorted({path.parent for path in RESULTS.rglob("comparison.json")}):
        places = {}
        for path in [folder / "comparison.json", *sorted(folder.glob("comparison-*.json"))]:
            data = json.loads(path.read_text(encoding="utf-8"))
            places[f"{data['text']['name']}, {data.get('context', data['config']['context']):,} tokens"] = data["rows"]
        tests = [json.loads(path.read_text(encoding="utf-8"))["test"] for path in folder.rglob("consolidation.json")]
        promised = sorted((test["skipped_frac"], test["increase"]) for test in tests)
        labels = {rule: label.replace("*", "") for rule, label in RULES.items()}
        drawn[f"consolidate_{folder.name}.svg"] = loss_by_share(places, labels, promised)
    return drawn


if __name__ == "__main__":
    from reproduction.pages import consolidate_summary

    renew(PAGE, consolidate_summary.sections(RESULTS))
    renew(TABLES, tables())
    for name, text in figures().items():
        write_text(FIGURES / name, text)
