"""Figures from records, as SVG text that a page can hold."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

# Colours that all readers can tell apart (Okabe and Ito 2008), without yellow, which is too faint on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PATH_COLOURS = {"e": COLOURS[1], "s": COLOURS[2], "w": "#d9d9d9"}
QUERY_MARKS = {"r": ("o", COLOURS[0]), "n": ("D", COLOURS[4]), "b": ("s", COLOURS[3])}  # by kind of query


def svg(figure: Figure) -> str:
    """SVG without a date, so that the same records give the same page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cramlab", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _label(record: dict[str, Any]) -> str:
    return f"{record['mixer']}, {record['size']}, seed {record['seed']}".replace("$", r"\$")  # no formula


def _validated(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["series"] if row["validation"] is not None]


def _per_run(found: list[dict[str, Any]], draw: Callable[[Axes, dict[str, Any], Any], None], ylabel: str) -> Axes:
    """A figure with one colour a mixer and one line a run."""
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    mixers = sorted({record["mixer"] for record in found})
    for record in found:
        draw(axes, record, COLOURS[mixers.index(record["mixer"]) % len(COLOURS)])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    return axes


def finish(axes: Axes, *, legend: bool = True) -> str:
    """The figure of these axes as SVG, with a grid and, if wanted, a legend."""
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize="small", ncols=1 + len(axes.get_legend_handles_labels()[0]) // 12)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return svg(figure)


def attention_over_steps(found: list[dict[str, Any]]) -> str:
    """Attention share on validation against its optimum, log axis; a triangle ends the encoding phase."""

    def draw(axes: Axes, record: dict[str, Any], colour: Any) -> None:
        rows = _validated(record)
        steps = [row["step"] for row in rows]
        share = [max(row["validation"]["attention_frac"], 1e-4) for row in rows]
        axes.plot(steps, share, color=colour, label=_label(record))
        if record["encoding_ended_step"] is not None and record["mixer"] != "transformer":
            axes.plot([record["encoding_ended_step"]], [1.0], marker="v", color=colour, linestyle="none")

    axes = _per_run(found, draw, "share of tokens that read")
    for optimum in sorted({round(record["oracle"]["attention_frac"], 3) for record in found}):
        axes.axhline(optimum, color="black", linestyle=":", label=f"optimum {optimum:.3f}")
    axes.set_yscale("log")
    return finish(axes)


def retrieval_over_steps(found: list[dict[str, Any]]) -> str:
    """Validation retrieval on recurring (solid) and novel (dashed) queries."""

    def draw(axes: Axes, record: dict[str, Any], colour: Any) -> None:
        rows = _validated(record)
        for name, style in (("recurring", "-"), ("novel", "--")):
            points = [(r["step"], r["validation"][f"retrieval_acc_{name}"]) for r in rows]
            points = [(step, value) for step, value in points if value is not None]
            label = f"{_label(record)}, {name}"
            axes.plot([p[0] for p in points], [p[1] for p in points], style, color=colour, label=label)

    axes = _per_run(found, draw, "retrieval accuracy")
    axes.set_ylim(-0.02, 1.02)
    return finish(axes)


def losses_over_steps(record: dict[str, Any]) -> str:
    """Every weighted loss term of one run."""
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots()
    terms = sorted({name for row in record["series"] for name in row["loss"]})
    for name, colour in zip(terms, itertools.cycle(COLOURS), strict=False):
        points = [(row["step"], row["loss"][name]) for row in record["series"] if row["loss"].get(name) is not None]
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, color=colour, linewidth=1)
    axes.set_yscale("symlog", linthresh=1e-3)  # a reward is a negative term
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("weighted loss term")
    axes.set_title(_label(record), fontsize="medium")
    return finish(axes)


def routing_raster(record: dict[str, Any]) -> str:
    """Token by token, which memory answered; queries marked recurring or novel, wrong answers crossed."""
    samples = record["samples"]
    height = 0.6 + 0.75 * len(samples)
    figure = Figure(figsize=(11, height))
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.05 / height, bottom=0.5 / height, hspace=0.5)
    rows = figure.subplots(len(samples), 1, squeeze=False)[:, 0]
    letters = list(PATH_COLOURS)
    for axes, sample in zip(rows, samples, strict=True):
        first = sample["first_token"]
        n = len(sample["path"])
        paths = np.array([[letters.index(letter) for letter in sample["path"]]])
        axes.imshow(
            paths,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(list(PATH_COLOURS.values())),
            vmin=0,
            vmax=len(letters) - 1,
            extent=(first - 0.5, first + n - 0.5, 0, 1),
        )
        for mark, (marker, colour) in QUERY_MARKS.items():
            places = [first + i for i, letter in enumerate(sample["history"]) if letter == mark]
            axes.plot(places, [1.25] * len(places), marker, color=colour, markersize=4, clip_on=False)
        wrong = [first + i for i, letter in enumerate(sample["correct"]) if letter == "0"]
        axes.plot(wrong, [1.25] * len(wrong), "x", color="black", markersize=7, clip_on=False)
        axes.set_ylim(0, 1.6)
        axes.set_yticks([])
        axes.spines[["top", "left", "right"]].set_visible(False)
    rows[-1].set_xlabel("position")
    return svg(figure)


def forecast(record: dict[str, Any]) -> str:
    """Next level and its forecast on the first sample."""
    sample = record["samples"][0]
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots()
    positions = range(sample["first_token"], sample["first_token"] + len(sample["level"]))
    axes.plot(positions, sample["level"], color="black", linewidth=1, label="next level")
    axes.plot(positions, sample["forecast"], color=COLOURS[1], linewidth=1, linestyle="--", label="forecast")
    axes.set_xlabel("position")
    axes.set_ylabel("level")
    return finish(axes)
