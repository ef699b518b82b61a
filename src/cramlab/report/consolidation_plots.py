"""Figures of a consolidation, as SVG text that a page can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cramlab.report.consolidation_figures import chosen
from cramlab.report.plots import COLOURS, finish, svg

_WIDTH = 6.5  # inches; legible on a telephone, which shrinks it to half


def loss_by_skipped(record: Mapping[str, Any], in_use: Mapping[str, Any] | None, labels: Mapping[str, str]) -> str:
    """Loss increase against the share of far reads skipped: tested thresholds, test documents, baselines."""
    figure = Figure(figsize=(_WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    tested = record["tested"]
    shares = [t["skipped_frac"] for t in tested]
    axes.axhline(record["promise"]["increase"], color=COLOURS[6], linestyle=":", label="guaranteed")
    axes.plot(shares, [t["upper_bound"] for t in tested], "v--", color=COLOURS[5], label="could be guaranteed")
    axes.plot(shares, [t["mean"] for t in tested], "o-", color=COLOURS[0], label="calibration documents")
    axes.plot([chosen(record)["skipped_frac"]], [chosen(record)["mean"]], "o", markersize=11, fillstyle="none",
              color=COLOURS[0], label="chosen")  # fmt: skip
    test = record["test"]
    axes.errorbar([test["skipped_frac"]], [test["increase"]], yerr=2 * (test["standard_error"] or 0), fmt="s",
                  color=COLOURS[1], capsize=3, label="test documents, ± 2 standard errors")  # fmt: skip
    for row, marker, colour in zip(in_use["baselines"] if in_use else (), "D^", COLOURS[2:4], strict=False):
        axes.plot([row["skipped_frac"]], [row["increase"]], marker, color=colour, label=labels[row["name"]])
    axes.set_xlabel("share of far reads skipped")
    axes.set_ylabel("increase of the loss, nats per token")
    return finish(axes)


def reads_by_layer(in_use: Mapping[str, Any]) -> str:
    """Two heat maps with one row a layer: far reads made, by place in the context; what far keys change, by group."""
    reads = np.array(in_use["reads"]["by_place"]).T  # (layers, places)
    reads = np.column_stack([reads, np.full(len(reads), np.nan), in_use["reads"]["by_layer"]])
    changed = np.array(in_use["changed"])
    n_layers, n_places = reads.shape[0], reads.shape[1] - 2
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.2 * n_layers), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(n_places + 2, max(4, changed.shape[1])))
    image = left.imshow(reads, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    edges = in_use["reads"]["edges"]
    marked = sorted({0, n_places // 2, n_places - 1})
    left.set_xticks([*marked, n_places + 1], [*(f"{edges[i]:,}" for i in marked), "all"])
    left.set_yticks(range(n_layers), [str(layer) for layer in in_use["layers"]], fontsize="small")
    left.set_xlabel("from position")
    left.set_ylabel("layer")
    left.set_title("far reads made", fontsize="medium")
    right.imshow(changed, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    groups = range(changed.shape[1])
    right.set_xticks(groups if len(groups) <= 12 else range(0, len(groups), len(groups) // 8))
    right.set_xlabel("key-value group")
    right.set_title("changed by far keys", fontsize="medium")
    figure.colorbar(image, ax=[left, right], label="share")
    return svg(figure)
