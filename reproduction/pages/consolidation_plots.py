"""Figures of the loss increase from skipped far reads, by rule, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cramlab.report.plots import COLOURS, svg

_COLOURS = (*COLOURS, *matplotlib.colormaps["tab20"].colors)  # type: ignore[attr-defined]
_LINEAR_BELOW = 0.02  # nats; the rest of the axis is logarithmic


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over documents and its standard error, NaN for a single document."""
    found = np.asarray(values, dtype=float)
    return float(found.mean()), float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.nan


def loss_by_share(
    places: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str],
    promised: Sequence[tuple[float, float]] = (),
) -> str:  # fmt: skip
    """Increase of the loss against the share of far reads skipped: one panel a place, one line a rule.

    Args:
        places: title of each panel, and the rows of its comparison: "rule", and by document "skipped_frac" and
            "increase". The first panel is that of the calibrated texts.
        labels: labels of the rules, in the order of the legend.
        promised: share and increase on test documents of each calibrated threshold, marked in the first panel.
    """
    n_columns = min(3, len(places))
    n_rows = -(-len(places) // n_columns)
    figure = Figure(figsize=(3.2 + 3.6 * n_columns, 1.6 + 3.0 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flatten()
    for axes, (title, rows) in zip(panels, places.items(), strict=False):
        for i, rule in enumerate(labels):
            of_rule = sorted(
                (float(np.mean(r["skipped_frac"])), *mean_and_error(r["increase"])) for r in rows if r["rule"] == rule
            )
            if not of_rule:
                continue
            shares, means, errors = zip(*of_rule, strict=True)
            first = i == 0
            axes.errorbar(
                shares, means, yerr=np.nan_to_num(errors), label=labels[rule],
                color=_COLOURS[i % len(_COLOURS)], marker="o",
                markersize=5 if first else 3, linewidth=2.2 if first else 1, capsize=2, zorder=3 if first else 2,
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=_LINEAR_BELOW)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("share of far reads skipped")
        axes.grid(alpha=0.3)
    for axes in panels[len(places) :]:
        axes.remove()
    if promised:
        panels[0].plot(*zip(*promised, strict=True), "*", color="black", markersize=11, label="calibrated", zorder=4)
    for axes in panels[: len(places) : n_columns]:
        axes.set_ylabel("increase, nats per token")
    named = {label: line for axes in panels[: len(places)] for line, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize="small")
    return svg(figure)
