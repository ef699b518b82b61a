"""Renews docs/language.md and its figures from the records in results/language/CORPUS.

python -m reproduction.pages.language
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from cramlab.report.intervals import seed_interval
from reproduction.pages import markdown
from reproduction.pages.renew import renew
from reproduction.protocols.language import ARMS

ROOT = Path(__file__).parents[2]
PAGE, FIGURES = ROOT / "docs" / "language.md", ROOT / "docs" / "figures"
CORPORA = ("code", "english")
Record = dict[str, Any]


def read(results: Path, corpus: str) -> dict[str, list[Record]]:
    """Records of the runs on a corpus by arm, in the order of `ARMS`, each arm's in the order of its seeds."""
    found: dict[str, list[Record]] = defaultdict(list)
    for path in sorted((results / "language" / corpus).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["config"]["arm"]].append(record)
    return {arm: sorted(found[arm], key=lambda record: record["config"]["seed"]) for arm in ARMS if arm in found}


def mean(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, with its 95% interval if there are several."""
    return seed_interval(values).format(digits)


def attention(record: Record) -> float:
    """Share of the tokens of the test text that read, mean over layers."""
    share = record["test"]["all"]["reads_frac"]
    return 1.0 if share is None else share


def recalled(record: Record, task: str, size: str, n: int) -> float:
    """Accuracy in a task of recall at a size; zero where the context was too short for it."""
    return next((row["accuracy"] for row in record["recall"][task] if row[size] == n), 0.0)


def table(arms: dict[str, list[Record]]) -> str:
    """A row for each arm, by loss, lowest first."""
    rows = []
    for arm, runs in arms.items():
        nats = [run["test"]["all"]["nats"] for run in runs]
        context = runs[0]["config"]["context"]
        cells = [
            arm, str(len(runs)), mean(nats, 3), mean([attention(run) for run in runs], 3),
            *(mean([run["test"][part]["nats"] for run in runs], 3) for part in ("repeated", "fresh")),
            mean([recalled(run, "lookup", "n_pairs", 16) for run in runs], 2),
            mean([recalled(run, "copying", "n_tokens", 64) for run in runs], 2),
            mean([recalled(run, "needle", "context", context) for run in runs], 2),
            f"{runs[0]['config']['learning_rate']:g}", f"{runs[0]['n_parameters'] / 1e6:.1f}",
        ]  # fmt: skip
        rows.append((statistics.fmean(nats), cells))
    columns = [
        "arm", "seeds", "nats a token", "attention", "repeated", "fresh", "lookup", "copying", "needle", "rate",
        "parameters, M",
    ]  # fmt: skip
    return markdown.table(columns, (cells for _, cells in sorted(rows)))


def layers_table(arms: dict[str, list[Record]]) -> str:
    """Share of reads of each layer with a gate, by arm."""
    gated = {arm: runs for arm, runs in arms.items() if runs[0]["config"].get("reads_frac")}
    rows = []
    for arm, runs in gated.items():
        by_layer = zip(*(run["test"]["all"]["reads_frac_by_layer"] for run in runs), strict=True)
        ended = [run["series"][-1]["encoding_ended_at"] for run in runs]
        shares = ", ".join(f"{statistics.fmean(layer):.3f}" for layer in by_layer)
        rows.append([arm, shares, ", ".join(map(str, ended))])
    return markdown.table(["arm", "share of reads, first to last layer", "encoding ended at step"], rows)


def familiarity_table(record: Record, n_gram: str) -> str:
    """Share of reads at equally hard tokens (rows), by how often their n-gram was trained on (columns)."""
    cells = record["test"]["by_count_and_nats"][n_gram]
    counts = sorted({cell["count_from"] for cell in cells})
    rows = []
    for nats in sorted({cell["nats_from"] for cell in cells}):
        row = [cell for cell in cells if cell["nats_from"] == nats]
        shares = {cell["count_from"]: cell["reads_frac"] for cell in row if cell["n"] >= 200}
        upper = row[0]["nats_to"]
        name = f"{nats:g} to {upper:g}" if upper is not None else f"{nats:g} or more"
        rows.append([name, *(f"{shares[count]:.3f}" if shares.get(count) is not None else "" for count in counts)])
    columns = [f"{n_gram}: nats without reads", *(f"seen {count:,} times or more" for count in counts)]
    return markdown.table(columns, rows)


def draw(arms: dict[str, list[Record]], corpus: str) -> None:
    """Loss against attention, a point a run; and attention over training of the arms with gates."""
    mpl.rcParams["svg.hashsalt"] = "cramlab"
    figure, (losses, shares) = plt.subplots(1, 2, figsize=(9, 3.6))
    for arm, runs in arms.items():
        dots = losses.scatter([attention(run) for run in runs], [run["test"]["all"]["nats"] for run in runs], s=18)
        losses.annotate(arm, (attention(runs[0]), runs[0]["test"]["all"]["nats"]), fontsize=6, xytext=(4, 2),
                        textcoords="offset points")  # fmt: skip
        if runs[0]["config"].get("reads_frac"):
            series = runs[0]["series"]
            shares.plot([row["n_tokens"] / 1e6 for row in series], [row["attention_frac"] for row in series],
                        label=arm, color=dots.get_facecolor()[0])  # fmt: skip
    losses.set(xlabel="attention, share of tokens, mean over layers", ylabel="nats a token, test text")
    shares.set(xlabel="tokens trained on, millions", ylabel="attention")
    shares.legend(fontsize=7)
    for axis in (losses, shares):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(FIGURES / f"language-{corpus}.svg", metadata={"Date": None})
    plt.close(figure)


def sections(results: Path) -> dict[str, str]:
    """The generated parts of the page by name."""
    found: dict[str, str] = {}
    for corpus in CORPORA:
        arms = read(results, corpus)
        if not arms:
            continue
        found[f"{corpus} arms"] = table(arms)
        found[f"{corpus} layers"] = layers_table(arms)
        if "cram-12" in arms:
            found[f"{corpus} familiarity"] = familiarity_table(arms["cram-12"][0], "trigram")
        draw(arms, corpus)
    return found


if __name__ == "__main__":
    renew(PAGE, sections(ROOT / "results"))
