"""Draws the figure of a corpus in docs/language.md: loss, attention over training, and the chance to read."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from reproduction.analysis.language import Arms, attention, nats, practice_curve


def name(corpus: str) -> str:
    """Name of the file."""
    return f"language-{corpus}.svg"


def draw(arms: Arms, corpus: str, folder: Path) -> None:
    """Writes the figure: a point a run, a curve an arm with gates."""
    mpl.rcParams["svg.hashsalt"] = "cramlab"
    figure, (losses, training, chance) = plt.subplots(1, 3, figsize=(12, 4))
    routed = [arm for arm, runs in arms.items() if "encoding_ended_at" in runs[0]["series"][-1]]
    colours = dict(zip(routed, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 2, strict=False))
    for arm, runs in arms.items():
        points = sorted((attention(run), nats(run)) for run in runs)
        losses.scatter(*zip(*points, strict=True), s=16, color=colours.get(arm, "grey"))
        losses.annotate(arm, points[0], fontsize=6, xytext=(4, 2), textcoords="offset points")
    losses.set(xlabel="attention, share of tokens, mean over layers", ylabel="nats a token, test text")
    _over_training(training, arms, colours)
    for arm in (arm for arm in routed if arms[arm][0]["config"].get("reads_frac")):
        k, share, _ = practice_curve(arms[arm], "trigram")
        chance.plot([max(x, 0.5) for x in k], share, marker=".", label=arm, color=colours[arm])
    chance.set(xlabel="times the trigram was seen in training (0 at the left)", ylabel="chance to read", xscale="log")
    for axis in (losses, training, chance):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / name(corpus), metadata={"Date": None})
    plt.close(figure)


def _over_training(axis: Axes, arms: Arms, colours: dict[str, str]) -> None:
    """Attention at each evaluation, of the first seed of each arm that routes."""
    for arm, colour in colours.items():
        series = arms[arm][0]["series"]
        axis.plot([row["n_tokens"] / 1e6 for row in series], [row["attention_frac"] for row in series], label=arm,
                  color=colour)  # fmt: skip
    axis.set(xlabel="tokens trained on, millions", ylabel="attention")
