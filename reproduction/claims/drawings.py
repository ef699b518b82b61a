"""Figures of docs/claims.md, as SVG text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cramlab.report.plots import svg
from reproduction.analysis.encounters import threshold_gate
from reproduction.analysis.human import TABLES
from reproduction.claims import bounds_rows, irregular_rows, practice_rows, transfer_rows
from reproduction.claims.transition_rows import PAPER_QUALITY

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_LEAST = 3e-3  # lower values are drawn here, because the axis is logarithmic
_LEAST_RATIO, _RIGHT = 0.02, 1e-4  # the same for attention over its bound, and for wrong answers


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def _finish_beside(axes: Axes) -> None:
    """Adds the grid, and the legend to the right of the axes."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def transition(runs: Sequence[dict[str, Any]]) -> str | None:
    """Draws attention and the mean q of recurring queries over training; a line a run, a colour a kind of run."""
    if not runs:
        return None
    figure = Figure(figsize=(10.5, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    names = sorted({(run["mixer"], run["variant"]) for run in runs})
    counts = {name: sum((run["mixer"], run["variant"]) == name for run in runs) for name in names}
    labelled: set[tuple[str, str]] = set()
    for run in runs:
        name = (run["mixer"], run["variant"])
        i = names.index(name)
        dash = "--" if "no_encoding" in run["variant"] else "-"
        style = {"color": _COLOURS[i % 10], "linewidth": 1.0, "linestyle": dash}
        validated = [row for row in run["series"] if row["validation"]]
        label = None if name in labelled else f"{' '.join(name)} ({counts[name]})"
        labelled.add(name)
        upper.plot(
            [row["step"] for row in validated],
            [max(row["validation"]["attention_frac"], _LEAST) for row in validated],
            label=label,
            **style,
        )
        known = [(row["step"], row["quality"]) for row in run["series"] if row.get("quality") is not None]
        lower.plot([step for step, _ in known], [q for _, q in known], **style)
        if run["encoding_ended_step"]:
            upper.axvline(run["encoding_ended_step"], color=_COLOURS[i % 10], linestyle=":", linewidth=0.8)
    upper.set_yscale("log")
    upper.set_ylabel("share of tokens that read\n(dotted: encoding ends)")
    lower.axhline(PAPER_QUALITY.value, color="black", linestyle=":", label="the paper's q at its transition")
    lower.set_ylabel("mean q of recurring queries")
    lower.set_xlabel("optimiser step")
    _finish_beside(upper)
    _finish(lower)
    return svg(figure)


def practice(found: Mapping[practice_rows.Key, practice_rows.Logs]) -> str:
    """Draws models, the null and people in logs, where a power law is a line."""
    # Many reads of the encoding phase hide the curve; the table shows both.
    shown = {key: group.summary for key, group in found.items() if key[0] in ("transition", "transfer")}
    shown = shown or {key: group.summary for key, group in found.items()}
    figure = Figure(figsize=(12.0, 7.0), layout="constrained")
    grid = figure.subplot_mosaic([["models", "models"], ["null", "people"]])
    models, null, people = grid["models"], grid["null"], grid["people"]
    for i, (key, summary) in enumerate(shown.items()):
        colour = _COLOURS[i % 10]
        marker = "oxs^v"[i // 10 % 5]
        models.plot(summary.k, np.maximum(summary.mean, _LEAST), marker, color=colour, markersize=3,
                    label=" ".join(filter(None, (key[0], *key[2:]))))  # fmt: skip
        best = next(iter(summary.together.values()))
        models.plot(summary.k, np.maximum(best.curve(summary.k), _LEAST), color=colour, linewidth=1)
    models.set_title("share of reads, and the best law")
    models.set_xlabel("encounter of a pattern")
    k = np.unique(np.round(np.geomspace(1, 2000, 60)))
    for spread in (0.5, 1.0, 2.0):
        log = threshold_gate(k, rate_spread=spread, n_patterns=400, rate=0.2)
        null.plot(k, np.maximum(log.hits.mean(axis=0), _LEAST), label=f"rates spread by {spread:g}")
    for pattern in threshold_gate(k, rate_spread=1.0, n_patterns=5, rate=0.2).hits:  # each is a step
        null.plot(k, np.maximum(pattern, _LEAST), color="black", linewidth=0.5, alpha=0.5)
    null.plot([], [], color="black", linewidth=0.5, alpha=0.5, label="single patterns: steps")
    null.set_title("null: thresholds on exponential learning, averaged")
    null.set_xlabel("encounter of a pattern")
    for name, table in TABLES.items():
        fitted = practice_rows.human()[name]
        x, y = np.array(table.x) / table.x[0], np.array(table.y)
        (line,) = people.plot(x, y / y[0], "o", markersize=4, label=f"{name}: {fitted.exponent[0]:.2f}")
        people.plot(x, fitted.fits["power"].curve(x) / y[0], color=line.get_color(), linewidth=1)
    people.set_title("people (Ebbinghaus), and the power law")
    people.set_xlabel("day, or delay over 20 minutes")
    for axes in (models, null, people):
        axes.set_xscale("log")
        axes.set_yscale("log")
    _finish_beside(models)
    _finish(null)
    _finish(people)
    return svg(figure)


def bounds(points: Sequence[bounds_rows.BoundPoint]) -> str | None:
    """Draws measured attention over the least that Theorem 1 asks for, by each quantity of it; below 1 it is broken."""
    found = [p for p in points if p.bound]
    if not found:
        return None
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    named = (
        ("query_frac", "share of positions that ask (f: times recurrence)"),
        ("recurring_frac", "recurrence: share of these queries"),
    )
    named = (*named, ("eps", "eps: wrong answers among recurring"), ("seq_len", "n: positions"))
    mixers = sorted({p.mixer for p in found})
    for axes, (name, title) in zip(panels.ravel(), named, strict=True):
        for mixer, holds in itertools.product(mixers, (True, False)):
            some = [p for p in found if p.mixer == mixer and p.holds == holds]
            i = mixers.index(mixer)
            # The points of each mixer are shifted a little.
            beside = 1 + 0.003 * (i - len(mixers) / 2)
            if some:
                axes.plot(
                    [max(getattr(p, name), _RIGHT) * beside for p in some],
                    [max(p.attention_frac / p.bound, _LEAST_RATIO) for p in some],
                    ("s" if holds else "ox^"[i // 10 % 3]), color=_COLOURS[i % 10], alpha=0.7, markersize=4,
                    label=f"{mixer}, {'keys reassigned' if holds else 'keys can be memorised'}",
                )  # fmt: skip
        axes.axhline(1.0, color="black", linestyle=":", label="Theorem 1, with the measured eps")
        axes.set(yscale="log", title=title, xscale="log" if name in ("eps", "seq_len") else "linear")
        axes.grid(alpha=0.3)
    n = np.unique(np.round(np.geomspace(64, 2048, 30))).astype(int)
    panels[1, 1].plot(n, [bounds_rows.ceiling(int(x)) for x in n], color="black", linestyle="--",
                      label="Corollary 1 and all that is novel, on SRCD")  # fmt: skip
    figure.supylabel(f"share of tokens that read (test) over the bound; {_LEAST_RATIO:g} stands for less")
    handles, labels = panels[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    return svg(figure)


def transfer(found: Sequence[transfer_rows.Row]) -> str | None:
    """Draws reads against wrong answers, a panel a target, with one legend for all."""
    if not found:
        return None
    targets = _in_order(found)
    columns = min(4, len(targets))
    lines = -(-(len(targets)) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    kinds = sorted({(row.mixer, row.way) for row in found})
    for axes, target in zip(panels, targets, strict=False):
        some = [row for row in found if row.target == target]
        for i, (mixer, way) in enumerate(kinds):
            points = [row for row in some if (row.mixer, row.way) == (mixer, way)]
            axes.plot([max(row.attention_frac, _LEAST) for row in points],
                      [max(1 - row.retrieval_acc, 1e-4) for row in points],
                      "ox"[i // 10 % 2], color=_COLOURS[i % 10], label=f"{mixer}, {way}")  # fmt: skip
        axes.axvline(some[0].oracle, color="black", linestyle=":", label="least reads")
        axes.set(xscale="log", yscale="log", title=target, xlim=(_LEAST, 1.3), ylim=(7e-5, 1.3))
        axes.grid(alpha=0.3)
    for axes in panels[len(targets) :]:
        axes.set_axis_off()
    figure.supxlabel(f"share of tokens that read (test; {_LEAST:g} stands for less)")
    figure.supylabel("wrong answers (test; 0.0001 stands for less)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize="x-small")
    return svg(figure)


def transfer_training(rows: Sequence[transfer_rows.Row]) -> str | None:
    """Draws training reads until retrieval is right, and until it is also sparse; a line a target, a colour a way."""
    found = [row for row in rows if row.mixer == "cram"]
    if not found:
        return None
    targets = _in_order(found)
    ways = sorted({row.way for row in found})
    figure = Figure(figsize=(10.0, 0.5 * len(targets) + 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    goals = ((left, "reads_to_goal", f"until {transfer_rows.GOAL:.0%} retrieval"),
             (right, "reads_to_sparse", f"... at {transfer_rows.SPARSE:g} x the least attention"))  # fmt: skip
    for axes, name, title in goals:
        for i, way in enumerate(ways):
            points = [row for row in found if row.way == way and getattr(row, name) is not None]
            height = (i - (len(ways) - 1) / 2) * 0.1
            axes.plot([getattr(row, name) for row in points], [targets.index(row.target) + height for row in points],
                      "o", color=_COLOURS[i % 10], markersize=4, label=way)  # fmt: skip
        axes.set(xscale="log", title=title, xlabel="tokens read in training, the source's not counted")
        axes.grid(alpha=0.3)
    left.set_yticks(range(len(targets)), targets)
    left.set_ylim(len(targets) - 0.5, -0.5)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ways), fontsize="x-small")
    return svg(figure)


def _in_order(found: Sequence[transfer_rows.Row]) -> list[str]:
    """The targets that have runs."""
    known = {row.target for row in found}
    return [target for target in transfer_rows.OTHER_FACTS + transfer_rows.SAME_FACTS if target in known]


def irregular(groups: irregular_rows.Groups) -> str | None:
    """Draws the AUC with its interval, a panel a data set."""
    if not groups:
        return None
    names = sorted({data for data, _ in groups})
    figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        models = [model for name, model in groups if name == data]
        for i, model in enumerate(models):
            value = irregular_rows.over_seeds(groups[data, model], "auc")
            if value is None:
                continue
            low, high = value.low if value.low is not None else value.mean, value.high or value.mean
            axes.errorbar([value.mean], [i], xerr=[[value.mean - low], [high - value.mean]], fmt="o", color="black")
        axes.set_yticks(range(len(models)), models)
        axes.set_xlabel("AUC, 95% interval")
        axes.set_title(data)
        axes.grid(alpha=0.3)
    return svg(figure)
