"""Renews the figures of docs/audit.md, which stand between marks, from the records in results/audit.

python -m reproduction.pages.audit
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cramlab.auditing import AuditResult, over_training
from cramlab.report.intervals import estimate
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "audit.md", ROOT / "results" / "audit"
PROBES = ("hidden", "stream", "mean", "token", "position", "shuffled", "other-domain")


def _probes(data: dict[str, Any]) -> str:
    rows = []
    named = [(name, data["probes"].get(name)) for name in PROBES]
    random = data["controls"].get("random_weights", {"probes": {}})["probes"]
    named += [(f"random weights, {name}", probe) for name, probe in random.items()]
    for name, probe in named:
        if probe is not None:
            rows.append([name, *(estimate(probe["overall"][m]) for m in ("r", "r_pooled", "r2", "cosine"))])
    return table(["probe", "R", "R pooled", "centred R²", "cosine"], rows)


def _heads(data: dict[str, Any]) -> str:
    names = {"r": "R", "r_of_mean": "R of the mean alone", "r2": "centred R²"}
    rows = [[names[key], *(estimate(e, ".2f") for e in shares.values())] for key, shares in data["head_shares"].items()]
    return table(["share of heads by", "above 0.8", "0.5 to 0.8", "below 0.5"], rows)


def _layers(data: dict[str, Any]) -> str:
    rows = []
    main, mean, alone = data["probes"]["hidden"]["layers"], data["probes"]["mean"]["layers"], data["loss"]["alone"]
    for i, layer in enumerate(data["model"]["layers"]):
        rows.append([str(layer), *(estimate(e[i], ".2f") for e in (main["r"], mean["r"], main["r2"])),
                     *(estimate(alone[i][kind]) for kind in ("probe", "mean", "zero"))])  # fmt: skip
    head = ["layer", "R", "R of the mean", "centred R²", "nats: probe", "nats: mean", "nats: zero"]
    return table(head, rows)


def _replaced(data: dict[str, Any]) -> str:
    rows = []
    n_layers = len(data["model"]["layers"])
    for row in data["loss"]["cumulative"] + data["loss"]["partial"]:
        what = f"{len(row['sites'])} best-predicted layers"
        if row["choice"] != "all":
            tokens = "best-predicted" if row["choice"] == "best" else "random"
            what = f"{row['share']:.0%} {tokens} tokens, all layers"
        share = len(row["sites"]) / n_layers * row["share"]
        rows.append([what, f"{share:.2f}", *(estimate(row[kind]) for kind in ("probe", "mean", "zero"))])
    return table(["replaced", "share of outputs", "nats: probe", "nats: mean", "nats: zero"], rows)


def _groups(data: dict[str, Any]) -> str:
    rows = []
    for row in [*data["by_class"], *data["by_position"]]:
        overall = row["overall"]
        rows.append([row["group"], f"{row['tokens']:,}", estimate(overall["r"]), estimate(overall["r2"])])
    return table(["tokens", "number", "R", "centred R²"], rows)


def _planted(data: dict[str, Any]) -> str:
    rows = []
    for i, row in enumerate(data["controls"]["planted"]["layers"]):
        read = "yes" if row["read_by_the_loss"] else "no"
        loss = row["loss"]
        rows.append([str(i), f"{row['planted_r2']:.4f}", estimate(row["r2"], ".4f"), read, estimate(loss["probe"]),
                     estimate(loss["zero"])])  # fmt: skip
    head = ["layer", "planted centred R²", "found", "read by the loss", "nats: probe", "nats: zero"]
    return table(head, rows)


def _cost(data: dict[str, Any]) -> str:
    parts, seconds = data["text"]["parts"], data["seconds"]
    sizes = ", ".join(f"{name.replace('_', ' ')} {p['tokens']:,} tokens of {p['documents']} documents"
                      for name, p in parts.items())  # fmt: skip
    stages = {name: s for name, s in seconds.items() if name != "total"}
    took = ", ".join(f"{name} {s:,.0f}" for name, s in stages.items()) + f", together {sum(stages.values()):,.0f}"
    return (
        f"{data['model']['name']} on {data['text']['name']} ({data['text']['version']}), contexts of "
        f"{data['config']['context']} tokens: {sizes}.\nSeconds: {took}. Memory at most "
        f"{data['peak_memory_bytes'] / 1e9:.2f} GB. {data['hardware']['processor']}, {data['hardware']['n_threads']} "
        f"thread; code {data['revision']}; {data['date']}.\nLoss untouched: {estimate(data['loss']['nats_per_token'])} "
        "nats per token."
    )


def _verdict(data: dict[str, Any]) -> str:
    v = data["verdict"]

    def layers(numbers: Sequence[int]) -> str:
        return ", ".join(map(str, numbers)) or "none"

    return (
        f"- predictable (R of {v['predictable_r']} or more): {layers(v['predictable'])}\n"
        f"- costly (the probe costs more than {v['removable_nats']} nats for certain): {layers(v['costly'])}\n"
        f"- **predictable, but not removable: {layers(v['predictable_not_removable'])}**\n"
        f"- rank correlation over layers of the loss with R: {v['rank_correlation_r_with_loss']:.2f}, with the centred "
        f"R²: {v['rank_correlation_r2_with_loss']:.2f}"
    )


def _over_training(data: dict[str, Any]) -> str:
    rows = []
    for p in data["points"]:
        training = p["training"]
        rows.append([p["run"], f"{p['step']:,}", f"{training['tokens']:,}", estimate(p["nats_per_token"], ".2f"),
                     f"{training['reads_frac']:.3f}", estimate(p["overall"]["hidden"]["r"]),
                     estimate(p["overall"]["mean"]["r"]), estimate(p["overall"]["hidden"]["r2"]),
                     estimate(p["replaced"]["probe"])])  # fmt: skip
    head = ["run", "step", "tokens seen", "nats per token", "reads", "R", "R of the mean", "centred R²", "nats: probe"]
    return table(head, rows)


def _trends(data: dict[str, Any]) -> str:
    rows = [[t["run"], f"{t['from_step']} to {t['to_step']}", t["r"]["direction"], estimate(t["r"]["change"]),
             t["r2"]["direction"], estimate(t["r2"]["change"])] for t in data["trends"]]  # fmt: skip
    return table(["run", "steps", "R", "change of R", "centred R²", "change of centred R²"], rows)


_MADE = {"cost": _cost, "probes": _probes, "heads": _heads, "layers": _layers, "replaced": _replaced, "groups": _groups,
         "verdict": _verdict, "planted": _planted}  # fmt: skip
SHOWN = {
    "smollm2": ("cost", "verdict", "probes", "heads", "layers", "replaced", "groups"),
    "glassllm": ("cost", "verdict", "probes", "layers", "planted"),
}


def sections() -> dict[str, str]:
    """Text of docs/audit.md by the name in its marks."""
    audits = {model: AuditResult.read(RESULTS / model / "audit.json").data for model in SHOWN}
    found = {f"{model} {name}": _MADE[name](audits[model]) for model, names in SHOWN.items() for name in names}
    training = over_training.read(RESULTS / "over_training" / over_training.FILE)
    return found | {"over training": _over_training(training), "trends": _trends(training)}


if __name__ == "__main__":
    renew(PAGE, sections())
