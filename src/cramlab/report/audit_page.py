"""The audit's pages: one HTML file each that opens from disk, with nothing to fetch."""

from __future__ import annotations

from typing import Any

from cramlab.report import audit_plots as plots
from cramlab.report.intervals import estimate
from cramlab.report.template import template

PROBE_NAMES = {
    "hidden": "after the norm (main)",
    "stream": "before the norm",
    "mean": "the mean alone",
    "token": "token type alone",
    "position": "position alone",
    "shuffled": "shuffled targets",
    "other-domain": "trained on another domain",
}


def render_audit(data: dict[str, Any]) -> str:
    """The page of one audit."""
    loss = data["loss"] is not None
    return template("audit.html.jinja").render(
        data=data,
        probes=[(PROBE_NAMES[name], _measures(data["probes"][name]["overall"])) for name in PROBE_NAMES
                if name in data["probes"]],
        head_shares=[(label, [estimate(e) for e in data["head_shares"][name].values()])
                     for name, label in (("r", "R"), ("r_of_mean", "R of the mean alone"), ("r2", "centred R²"))],
        layers=_layers(data),
        classes=[(g["group"], g["tokens"], estimate(g["overall"]["r"]), estimate(g["overall"]["r2"]))
                 for g in data["by_class"]],
        heat_r=plots.heat_map(data, "r"),
        heat_r2=plots.heat_map(data, "r2"),
        depth_r=plots.over_depth(data, "r", ("hidden", "stream", "mean")),
        depth_r2=plots.over_depth(data, "r2", [name for name in PROBE_NAMES if name != "mean"]),
        distribution=plots.distribution(data),
        position=plots.by_position(data),
        rank=plots.by_rank(data),
        loss_by_layer=plots.loss_by_layer(data) if loss else "",
        loss_by_share=plots.loss_by_share(data) if loss else "",
        verdict_plot=plots.predictable_against_removable(data) if loss else "",
        replaced=_replaced(data) if loss else [],
        estimate=estimate,
        random_weights=[
            (PROBE_NAMES[name], _measures(probe["overall"]))
            for name, probe in data["controls"].get("random_weights", {}).get("probes", {}).items()
        ],
    )  # fmt: skip


def render_over_training(data: dict[str, Any]) -> str:
    """The page of an audit over training."""
    rows = []
    for point in data["points"]:
        training = point["training"] or {}
        rows.append(
            (
                point["run"],
                point["step"],
                "-" if point["nats_per_token"] is None else estimate(point["nats_per_token"]),
                "-" if "reads_frac" not in training else f"{training['reads_frac']:.3f}",
                estimate(point["overall"]["hidden"]["r"]),
                estimate(point["overall"]["mean"]["r"]),
                estimate(point["overall"]["hidden"]["r2"]),
                "-" if point["replaced"] is None else estimate(point["replaced"]["probe"]),
            )
        )
    return template("over_training.html.jinja").render(
        data=data,
        rows=rows,
        estimate=estimate,
        r=plots.over_training(data, "r"),
        r2=plots.over_training(data, "r2"),
        reads=plots.reads_over_training(data),
    )


def _measures(overall: dict[str, Any]) -> list[str]:
    return [estimate(overall[measure]) for measure in ("r", "r_pooled", "r2", "cosine")]


def _layers(data: dict[str, Any]) -> list[list[str]]:
    """One row a layer."""
    rows = []
    main, mean = data["probes"]["hidden"]["layers"], data["probes"]["mean"]["layers"]
    for i, layer in enumerate(data["model"]["layers"]):
        row = [str(layer), *(estimate(e) for e in (main["r"][i], mean["r"][i], main["r2"][i], main["cosine"][i]))]
        if data["loss"] is not None:
            row += [estimate(data["loss"]["alone"][i][kind]) for kind in ("probe", "mean", "zero")]
        rows.append(row)
    return rows


def _replaced(data: dict[str, Any]) -> list[list[str]]:
    """One row a way of replacing more than one layer."""
    n_layers = len(data["model"]["layers"])
    rows = []
    for row in data["loss"]["cumulative"] + data["loss"]["partial"]:
        what = f"{len(row['sites'])} best-predicted of {n_layers} layers, all tokens"
        if row["choice"] != "all":
            tokens = "best-predicted" if row["choice"] == "best" else "random"
            what = f"all layers, {tokens} {row['share']:.0%} of tokens"
        share = len(row["sites"]) / n_layers * row["share"]
        rows.append([what, f"{share:.2f}", *(estimate(row[kind]) for kind in ("probe", "mean", "zero"))])
    return rows
