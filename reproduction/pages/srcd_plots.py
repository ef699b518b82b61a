"""Figures of the SRCD benchmark over all its mixers, as SVG text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cramlab.report.plots import finish
from cramlab.report.tables import Row, summarise

_COLOURS = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
_LEAST_SHARE, _LEAST_ERROR = 3e-3, 1e-4  # lower values are drawn here, because the axis is logarithmic
_CHARACTER, _LINE = 4.0, 8.0  # width and height of labels, points


def _figure(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def pareto(found: Iterable[dict[str, Any]]) -> str:
    """Attention against wrong answers to novel queries, both on log axes: the best is at the lower left."""
    rows: list[Row] = summarise(found)
    axes = _figure(8.5, 5.5)
    points = {row.mixer: (max(row.attention_frac.mean, _LEAST_SHARE), max(1 - row.novel.mean, _LEAST_ERROR))
              for row in rows}  # fmt: skip
    for i, (mixer, point) in enumerate(points.items()):
        axes.plot(*point, "o", color=_COLOURS[i % len(_COLOURS)], label=mixer)
    if rows:
        axes.axvline(rows[0].oracle_attention_frac, color="black", linestyle=":", label="least attention (oracle)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"share of tokens that use attention (test; {_LEAST_SHARE:g} stands for none)")
    axes.set_ylabel("wrong answers to novel queries (test)")
    axes.margins(x=0.15)
    _label(axes, points)
    return finish(axes, legend=False)


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes a name beside each point, from the top down; one that would overlap another is moved below it."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # sets the scale of the axes
    in_points = 72 / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = axes.transData.transform(point) * in_points
        left, width, low = x + 5, _CHARACTER * len(name), y + 2
        while any(abs(low - other) < _LINE and left < end and begin < left + width for begin, end, other in taken):
            low -= 1
        taken.append((left, left + width, low))
        line = {"arrowstyle": "-", "linewidth": 0.4} if y - low > _LINE else None
        axes.annotate(name, point, (5, low - y), textcoords="offset points", fontsize=7, arrowprops=line)


def attention_by_mixer(found: Iterable[dict[str, Any]]) -> str:
    """Attention on validation over training tokens: median over seeds, and the range between them."""
    axes = _figure(8.5, 4.5)
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        groups.setdefault(record["mixer"], []).append(record)
    for i, (mixer, group) in enumerate(sorted(groups.items())):
        shares: dict[int, list[float]] = {}
        for record in group:
            for row in record["series"]:
                if row["validation"] is not None:
                    shares.setdefault(row["step"], []).append(max(row["validation"]["attention_frac"], _LEAST_SHARE))
        steps = sorted(step for step, values in shares.items() if 2 * len(values) > len(group))
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(steps, [statistics.median(shares[s]) for s in steps], color=colour, label=mixer, linewidth=1.2)
        low, high = [min(shares[s]) for s in steps], [max(shares[s]) for s in steps]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("optimiser step, while more than half of the seeds still train")
    axes.set_ylabel(f"share of tokens that read ({_LEAST_SHARE:g} stands for none)")
    return finish(axes, legend=True)


def recurrence_sweep(found: Iterable[dict[str, Any]]) -> str:
    """Attention over the share of recurring queries, against query share x novel share."""
    found = list(found)
    axes = _points(found, lambda task: 100 * task["recurring_frac"])
    queries = found[0]["config"]["task"]["query_frac"]
    axes.plot([0, 100], [queries, 0.0], color="black", linestyle=":", label="optimum: query share x novel share")
    axes.set_xlabel("recurring queries, %")
    return finish(axes, legend=True)


def _points(found: list[dict[str, Any]], x: Callable[[dict[str, Any]], float]) -> Axes:
    axes = _figure(7.0, 4.0)
    for i, mixer in enumerate(sorted({record["mixer"] for record in found})):
        group = [record for record in found if record["mixer"] == mixer]
        xs = [x(record["config"]["task"]) for record in group]
        ys = [record["metrics"]["test"]["attention_frac"] for record in group]
        axes.plot(xs, ys, "o", color=_COLOURS[2 * i], label=f"{mixer}, a point a seed")
    axes.set_ylabel("share of tokens that use attention (test)")
    return axes


def longer_sequences(found: Iterable[dict[str, Any]]) -> str:
    """Wrong answers to novel queries at lengths beyond that of training; a line a mixer, mean over seeds."""
    axes = _figure(7.0, 4.0)
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        if record["metrics"].get("test_at"):
            groups.setdefault(record["mixer"], []).append(record)
    for i, (mixer, group) in enumerate(sorted(groups.items())):
        lengths = [group[0]["config"]["task"]["seq_len"], *map(int, group[0]["metrics"]["test_at"])]
        tests = [[record["metrics"]["test"], *record["metrics"]["test_at"].values()] for record in group]
        wrong = [
            max(1 - statistics.fmean(t[j]["retrieval_acc_novel"] for t in tests), _LEAST_ERROR)
            for j in range(len(lengths))
        ]
        axes.plot(lengths, wrong, "o-", color=_COLOURS[i % len(_COLOURS)], label=mixer, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens a sequence at test; the shortest is that of training")
    axes.set_ylabel("wrong answers to novel queries")
    return finish(axes, legend=True)
