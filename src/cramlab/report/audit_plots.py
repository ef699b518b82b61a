"""Figures of an audit, as SVG text that a page can hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cramlab.report.plots import COLOURS, finish, svg

KIND_COLOURS = {"probe": COLOURS[0], "mean": COLOURS[4], "zero": "#7f7f7f"}


def _axes(width: float = 8.5, height: float = 3.4) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def _bars(axes: Axes, x: Sequence[float], estimates: Sequence[Sequence[float | None]], **style: Any) -> None:
    """Draws points with their intervals; a missing interval is left out."""
    values = np.array([[np.nan if v is None else v for v in e] for e in estimates], dtype=float)
    spread = np.nan_to_num(np.clip([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]], 0, None))
    axes.errorbar(x, values[:, 0], yerr=spread, marker="o", markersize=3, linewidth=1, capsize=2, **style)


def _whole_layers(axes: Axes, label: str) -> None:
    """Sets the ticks of an axis to whole layers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)


def heat_map(data: dict[str, Any], measure: str) -> str:
    """Layers by heads, with the layer's output as the last column."""
    probe = data["probes"]["hidden"]
    heads = [[estimate[0] for estimate in row] for row in probe["heads"][measure]]
    whole = [estimate[0] for estimate in probe["layers"][measure]]
    table = np.array([[*row, np.nan, value] for row, value in zip(heads, whole, strict=True)], dtype=float)
    n_layers, n_heads = len(heads), len(heads[0])
    figure = Figure(figsize=(min(11, 2.5 + 0.35 * (n_heads + 2)), 1.2 + 0.2 * n_layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks([*range(n_heads), n_heads + 1], [*map(str, range(n_heads)), "layer"])
    axes.set_yticks(range(n_layers), [str(layer) for layer in data["model"]["layers"]], fontsize="small")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label={"r": "R", "r2": "centred R²"}[measure])
    return svg(figure)


def over_depth(data: dict[str, Any], measure: str, probes: Sequence[str]) -> str:
    """One curve a probe, from the first layer to the last."""
    axes = _axes()
    for name, colour in zip(probes, itertools.cycle(COLOURS), strict=False):
        if name in data["probes"]:
            _bars(axes, data["model"]["layers"], data["probes"][name]["layers"][measure], label=name, color=colour)
    _whole_layers(axes, "layer")
    axes.set_ylabel({"r": "R", "r2": "centred R²"}[measure])
    return finish(axes)


def loss_by_layer(data: dict[str, Any]) -> str:
    """Nats per token when one layer is replaced."""
    axes = _axes()
    for kind, colour in KIND_COLOURS.items():
        estimates = [row[kind] for row in data["loss"]["alone"]]
        _bars(axes, data["model"]["layers"], estimates, label=kind, color=colour)
    axes.set_yscale("symlog", linthresh=0.01)
    _whole_layers(axes, "layer replaced")
    axes.set_ylabel("increase of the loss, nats per token")
    return finish(axes)


def loss_by_share(data: dict[str, Any]) -> str:
    """Nats per token against the share of all outputs that is replaced."""
    axes = _axes()
    n_layers = len(data["model"]["layers"])
    for kind, colour in KIND_COLOURS.items():
        whole = data["loss"]["cumulative"]
        shares = [len(row["sites"]) / n_layers for row in whole]
        _bars(axes, shares, [row[kind] for row in whole], label=f"{kind}, whole layers", color=colour)
        for choice, style in (("random", "--"), ("best", ":")):
            rows = [row for row in data["loss"]["partial"] if row["choice"] == choice]
            label = f"{kind}, {'best-predicted' if choice == 'best' else 'random'} tokens"
            _bars(axes, [r["share"] for r in rows], [r[kind] for r in rows], label=label, color=colour, linestyle=style)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xlabel("share of outputs replaced")
    axes.set_ylabel("increase of the loss, nats per token")
    return finish(axes)


def predictable_against_removable(data: dict[str, Any]) -> str:
    """R of each layer against the loss increase when the probe replaces it."""
    axes = _axes(6, 3.6)
    r = [estimate[0] for estimate in data["probes"]["hidden"]["layers"]["r"]]
    nats = [row["probe"][0] for row in data["loss"]["alone"]]
    axes.plot(r, nats, "o", markersize=4, label="layer")
    for layer, x, y in zip(data["model"]["layers"], r, nats, strict=True):
        axes.annotate(str(layer), (x, y), fontsize="x-small", xytext=(3, 2), textcoords="offset points")
    axes.axvline(data["verdict"]["predictable_r"], color="black", linestyle=":", label="called predictable from here")
    axes.axhline(data["verdict"]["removable_nats"], color=COLOURS[1], linestyle=":", label="called costly from here")
    axes.set_xlabel("R")
    axes.set_ylabel("nats per token when the probe replaces it")
    return finish(axes)


def distribution(data: dict[str, Any]) -> str:
    """Histogram of the R of single tokens, by layer."""
    counts = np.array(data["distribution"]["layers"], dtype=float)
    edges = data["distribution"]["edges"]
    n_layers = len(counts)
    axes = _axes(8.5, 1.2 + 0.2 * n_layers)
    shares = counts / counts.sum(axis=1, keepdims=True)
    image = axes.imshow(shares, aspect="auto", cmap="magma", extent=(edges[0], edges[-1], n_layers - 0.5, -0.5))
    axes.set_yticks(range(n_layers), [str(layer) for layer in data["model"]["layers"]], fontsize="small")
    axes.set_xlabel("R of a token (below -1 counted at -1)")
    axes.set_ylabel("layer")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.colorbar(image, ax=axes, label="share of tokens")
    return svg(figure)


def by_rank(data: dict[str, Any]) -> str:
    """Centred R² of the layers' outputs by rank of the probe."""
    axes = _axes()
    ranks = data["by_rank"]["ranks"]
    for layer, row in zip(data["model"]["layers"], data["by_rank"]["r2"], strict=True):
        axes.plot(ranks, [estimate[0] for estimate in row], linewidth=0.8, alpha=0.6, color=COLOURS[0])
        axes.annotate(str(layer), (ranks[-1], row[-1][0]), fontsize="xx-small")
    means = np.array([[estimate[0] for estimate in row] for row in data["by_rank"]["r2"]]).mean(axis=0)
    axes.plot(ranks, means, color="black", linewidth=2, label="mean over layers")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlabel("rank of the probe (0: the mean alone)")
    axes.set_ylabel("centred R²")
    return finish(axes)


def by_position(data: dict[str, Any]) -> str:
    """R and centred R² by position in the context, averaged over layers."""
    axes = _axes(8.5, 3)
    rows = data["by_position"]
    for measure, label in (("r", "R"), ("r2", "centred R²")):
        _bars(axes, range(len(rows)), [row["overall"][measure] for row in rows], label=label)
    axes.set_xticks(range(len(rows)), [row["group"] for row in rows])
    axes.set_xlabel("position in the context")
    return finish(axes)


def over_training(data: dict[str, Any], measure: str) -> str:
    """One curve a run over its checkpoints; dashed: predicting the mean."""
    axes = _axes()
    for i, run in enumerate(sorted({point["run"] for point in data["points"]})):
        points = [point for point in data["points"] if point["run"] == run]
        steps = [point["step"] for point in points]
        _bars(
            axes, steps, [p["overall"]["hidden"][measure] for p in points], label=run, color=COLOURS[i % len(COLOURS)]
        )
        if measure == "r":
            axes.plot(
                steps,
                [p["overall"]["mean"]["r"][0] for p in points],
                "--",
                color=COLOURS[i % len(COLOURS)],
                linewidth=0.8,
            )
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel({"r": "R (dashed: of the mean)", "r2": "centred R²"}[measure])
    return finish(axes)


def reads_over_training(data: dict[str, Any]) -> str:
    """Share of tokens that read under the router's own rule, on held-out text."""
    axes = _axes(8.5, 3)
    for i, run in enumerate(sorted({point["run"] for point in data["points"]})):
        points = [p for p in data["points"] if p["run"] == run and p["training"] is not None]
        axes.plot([p["step"] for p in points], [p["training"]["reads_frac"] for p in points], "o-",
                  color=COLOURS[i % len(COLOURS)], label=run, markersize=3)  # fmt: skip
    axes.set_xscale("symlog", linthresh=10)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("share of tokens that read")
    return finish(axes)
