"""Figures of docs/claims.md, as SVG text."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cramlab.analysis.human import TABLES
from cramlab.analysis.practice import threshold_gate
from cramlab.report.claims import bounds_rows, irregular_rows, practice_rows, transfer_rows
from cramlab.report.claims.evidence import Evidence
from cramlab.report.claims.transition_rows import PAPER_QUALITY
from cramlab.report.plots import svg

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_LEAST = 3e-3  # what lies below is drawn there, so that a log axis can show it


def draw(evidence: Evidence) -> dict[str, str]:
    """By file name, for whatever there are records of."""
    made = {
        "transition.svg": transition(evidence),
        "practice.svg": practice(evidence),
        "bounds.svg": bounds(evidence),
        "transfer.svg": transfer(evidence),
        "irregular.svg": irregular(evidence),
    }
    return {name: text for name, text in made.items() if text is not None}


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def transition(evidence: Evidence) -> str | None:
    """Attention, and below it the mean q of recurring queries, over training; a line a run."""
    runs = evidence.of("transition")
    if not runs:
        return None
    figure = Figure(figsize=(8.5, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    names = sorted({(run["mixer"], run["variant"]) for run in runs})
    for run in runs:
        i = names.index((run["mixer"], run["variant"]))
        dash = "--" if "no_encoding" in run["variant"] else "-"
        style = {"color": _COLOURS[i % 10], "linewidth": 1.2, "linestyle": dash}
        validated = [row for row in run["series"] if row["validation"]]
        label = f"{run['mixer']} {run['variant']}, seed {run['seed']}"
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
    lower.axhline(PAPER_QUALITY, color="black", linestyle=":", label="the paper's q at its transition")
    lower.set_ylabel("mean q of recurring queries")
    lower.set_xlabel("optimiser step")
    _finish(upper)
    _finish(lower)
    return svg(figure)


def practice(evidence: Evidence) -> str | None:
    """Models, the null and people: all in logs, where a power law is a line."""
    found = practice_rows.summaries(evidence)
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    models, null, people = figure.subplots(1, 3)
    for i, (key, (_, summary)) in enumerate(found.items()):
        colour = _COLOURS[i % 10]
        models.plot(summary.k, np.maximum(summary.mean, _LEAST), "o", color=colour, markersize=3,
                    label=" ".join(filter(None, key)))  # fmt: skip
        best = next(iter(summary.averaged.values()))
        models.plot(summary.k, np.maximum(best.curve(summary.k), _LEAST), color=colour, linewidth=1)
    models.set_title("share of reads, and the best law")
    models.set_xlabel("encounter of a pattern")
    k = np.unique(np.round(np.geomspace(1, 2000, 60)))
    for spread in (0.5, 1.0, 2.0):
        log = threshold_gate(k, rate_spread=spread, n_patterns=400, rate=0.2)
        null.plot(k, np.maximum(log.hits.mean(axis=0), _LEAST), label=f"rates spread by {spread:g}")
    null.set_title("null: a threshold on exponential learning")
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
        _finish(axes)
    return svg(figure)


def bounds(evidence: Evidence) -> str | None:
    """Measured attention against what Theorem 1 asks for; below the diagonal it is broken."""
    found = bounds_rows.points(evidence)
    if not found:
        return None
    figure = Figure(figsize=(7.0, 5.5), layout="constrained")
    axes = figure.subplots()
    mixers = sorted({p.mixer for p in found})
    for mixer in mixers:
        for holds, marker in ((True, "s"), (False, "o")):
            some = [p for p in found if p.mixer == mixer and p.holds == holds]
            if some:
                axes.plot(
                    [max(p.bound, _LEAST) for p in some],
                    [max(p.attention_frac, _LEAST) for p in some],
                    marker,
                    color=_COLOURS[mixers.index(mixer) % 10],
                    alpha=0.7,
                    markersize=5,
                    label=f"{mixer}, {'keys reassigned' if holds else 'keys can be memorised'}",
                )
    edge = np.array([_LEAST, 0.15])
    axes.plot(edge, edge, color="black", linestyle=":", label="Theorem 1")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("least share of reads by Theorem 1, from f and the measured eps")
    axes.set_ylabel(f"share of tokens that read (test; {_LEAST:g} stands for less)")
    _finish(axes)
    return svg(figure)


def transfer(evidence: Evidence) -> str | None:
    """Reads against wrong answers, a panel a target."""
    found = transfer_rows.found(evidence)
    if not found:
        return None
    targets = sorted({row.target for row in found})
    figure = Figure(figsize=(3.4 * len(targets), 3.6), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
        some = [row for row in found if row.target == target]
        for i, (mixer, way) in enumerate(sorted({(row.mixer, row.way) for row in some})):
            points = [row for row in some if (row.mixer, row.way) == (mixer, way)]
            axes.plot([max(row.attention_frac, _LEAST) for row in points],
                      [max(1 - row.retrieval_acc, 1e-4) for row in points],
                      "o", color=_COLOURS[i % 10], label=f"{mixer}, {way}")  # fmt: skip
        axes.axvline(some[0].oracle, color="black", linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(target)
        axes.set_xlabel("share of tokens that read")
        axes.set_ylabel("wrong answers")
        _finish(axes)
    return svg(figure)


def irregular(evidence: Evidence) -> str | None:
    """AUC with its interval, a panel a data set."""
    groups = irregular_rows.groups(evidence)
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
