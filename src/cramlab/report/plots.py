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
_LABELS_INSIDE = 16  # a longer legend stands beside the axes
_NO_LABEL = "_"  # labels that begin so are left out of legends
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


def _labels(found: list[dict[str, Any]], *, by_mixer: bool) -> list[str]:
    """A label for each run; or one for each mixer, at its first run."""
    if not by_mixer:
        return [_label(record) for record in found]
    mixers = [record["mixer"].replace("$", r"\$") for record in found]
    return [mixer if mixer not in mixers[:i] else _NO_LABEL for i, mixer in enumerate(mixers)]


def _validated(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["series"] if row["validation"] is not None]


def _per_run(
    found: list[dict[str, Any]], draw: Callable[[Axes, dict[str, Any], Any, str], None], ylabel: str, title: str
) -> Axes:
    """A figure with one colour for each mixer and one line for each run, which `draw` draws and labels."""
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    mixers = sorted({record["mixer"] for record in found})
    colours = COLOURS if len(mixers) <= len(COLOURS) else matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for record, label in zip(found, _labels(found, by_mixer=bool(title)), strict=True):
        draw(axes, record, colours[mixers.index(record["mixer"]) % len(colours)], label)
    axes.set_title(title.replace("$", r"\$"), fontsize="medium")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    return axes


def finish(axes: Axes, *, legend: bool = True) -> str:
    """The figure of these axes as SVG, with a grid and, if wanted, a legend."""
    axes.grid(alpha=0.3)
    if legend:
        labels = axes.get_legend_handles_labels()[1]
        beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        place: dict[str, Any] = beside if len(labels) > _LABELS_INSIDE else {"loc": "best"}
        axes.legend(fontsize="small", ncols=1 + len(labels) // 24, **place)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return svg(figure)


def attention_over_steps(found: list[dict[str, Any]], title: str = "") -> str:
    """Attention share on validation against its optimum, log axis; a triangle ends the encoding phase.

    Under a title, labels name mixers instead of runs.
    """

    def draw(axes: Axes, record: dict[str, Any], colour: Any, label: str) -> None:
        rows = _validated(record)
        steps = [row["step"] for row in rows]
        share = [max(row["validation"]["attention_frac"], 1e-4) for row in rows]
        axes.plot(steps, share, color=colour, label=label)
        if record["encoding_ended_step"] is not None and record["mixer"] != "transformer":
            axes.plot([record["encoding_ended_step"]], [1.0], marker="v", color=colour, linestyle="none")

    axes = _per_run(found, draw, "share of tokens that read", title)
    for optimum in sorted({round(record["oracle"]["attention_frac"], 3) for record in found}):
        axes.axhline(optimum, color="black", linestyle=":", label=f"optimum {optimum:.3f}")
    axes.set_yscale("log")
    return finish(axes)


def retrieval_over_steps(found: list[dict[str, Any]], title: str = "") -> str:
    """Validation retrieval on recurring (solid) and novel (dashed) queries.

    Under a title, labels name mixers instead of runs.
    """

    def draw(axes: Axes, record: dict[str, Any], colour: Any, label: str) -> None:
        rows = _validated(record)
        for name, style in (("recurring", "-"), ("novel", "--")):
            points = [(r["step"], r["validation"][f"retrieval_acc_{name}"]) for r in rows]
            points = [(step, value) for step, value in points if value is not None]
            full = f"{label}, {name}"  # the caption says which line is solid
            axes.plot([p[0] for p in points], [p[1] for p in points], style, color=colour, label=full)

    axes = _per_run(found, draw, "retrieval accuracy", title)
    axes.set_ylim(-0.02, 1.02)
    return finish(axes)


def losses_over_steps(record: dict[str, Any]) -> str:
    """Every weighted loss term of one run."""
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots()
    terms = sorted({name for row in record["series"] for name in row.get("loss", ())})
    for name, colour in zip(terms, itertools.cycle(COLOURS), strict=False):
        losses = [(row["step"], row.get("loss", {}).get(name)) for row in record["series"]]
        points = [(step, loss) for step, loss in losses if loss is not None]
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, color=colour, linewidth=1)
    axes.set_yscale("symlog", linthresh=1e-3)  # a reward is a negative term
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("weighted loss term")
    axes.set_title(_label(record), fontsize="medium")
    return finish(axes)


def routing_raster(record: dict[str, Any]) -> str:
    """The memory that was used for each token; queries are marked recurring or novel, wrong answers crossed."""
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
