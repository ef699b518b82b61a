"""Table and figure of SRCD with change in docs/drift.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("svg")
from matplotlib import pyplot as plt

from reproduction.analysis.drift_cram import Record, by_setting, values
from reproduction.pages.markdown import table

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "drift.svg"
_SHOWN = 0.3  # rho of the figure
_COLUMNS = (
    "patterns rebound", "change", "arm", "tokens to the alarm (median)", "reads a pattern until 0.99",
    "accuracy on rebound patterns: before", "worst block after", "at the end", "lost on the others",
    "attention / optimum: before", "peak", "at the end", "groups open at the end",
)  # fmt: skip


def section(found: Sequence[Record]) -> str:
    """Number of seeds, table of means over them, and the figure; one sentence while there are no records."""
    if not found:
        return "Not measured yet: there are no records of `reproduction.protocols.drift_cram`."
    said = f"Means over {len(found)} seeds; {found[0]['setting']['max_steps']:,} steps of training each."
    return f"{said}\n\n{rows(found)}\n\n![Accuracy, attention and evidence after a change](figures/{FIGURE.name})"


def rows(found: Sequence[Record]) -> str:
    """Table of what happened by rho, kind of change and arm."""
    lines, n_patterns = [], found[0]["setting"]["task"]["n_patterns"]
    for (_, change, arm), of in by_setting(found).items():
        alarms = [stream["events"]["alarm"] for stream, _ in of]
        known = [tokens for tokens in alarms if tokens is not None]
        reads, lost = values(of, lambda one: one.reads), values(of, lambda one: one.lost)
        never = len(of) - len(reads)
        said = f"{np.mean(reads):.0f}" + f" ({never} of {len(of)} never)" * bool(never) if reads else "never"
        accuracy = np.array([(one.before, one.lowest, one.last) for _, one in of])
        ratios = np.array([(one.attention_before, one.peak, one.attention) for _, one in of])
        lines.append((
            f"{of[0][0]['changed']} of {n_patterns}", change, arm, f"{np.median(known):,.0f}" if known else "-",
            said if change == "abrupt" else "-", *(f"{mean:.3f}" for mean in accuracy.mean(axis=0)),
            f"{np.mean(lost):+.5f}" if lost else "-", *(f"{mean:.2f}" for mean in ratios.mean(axis=0)),
            f"{np.mean([one.open for _, one in of]):.1f}",
        ))  # fmt: skip
    return table(_COLUMNS, lines)


def draw(found: Sequence[Record], path: Path = FIGURE) -> None:
    """Writes the figure: accuracy on rebound patterns, attention and evidence over the stream, means over seeds."""
    mpl.rcParams["svg.hashsalt"] = "cramlab"
    setting = found[0]["setting"]
    per_block = setting["block"] * setting["batch"] * setting["task"]["seq_len"] / 1e3
    n_before, n_after = (setting[name] // setting["block"] for name in ("before", "after"))
    at = (np.arange(n_before + n_after) + 1 - n_before) * per_block
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    titles = ("accuracy on rebound patterns", "attention / optimum", "evidence of stale answers, nats")
    for (rho, change, arm), of in by_setting(found).items():
        if rho != _SHOWN or change != "abrupt":
            continue
        accuracy, attention, optimum, evidence = (
            np.array([stream["blocks"][name] for stream, _ in of], dtype=np.float64).mean(axis=0)
            for name in ("changed", "attention", "optimum", "evidence")
        )
        for axis, curve in zip(axes, (accuracy, attention / optimum, evidence), strict=True):
            axis.plot(at, curve, label=arm)
    axes[2].axhline(-np.log(setting["alpha"]), color="grey", linewidth=0.8)
    axes[2].annotate("alarm", (at[-1], -np.log(setting["alpha"])), ha="right", va="bottom", fontsize=8, color="grey")
    for axis, title in zip(axes, titles, strict=True):
        axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel="tokens after the change, thousands", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
