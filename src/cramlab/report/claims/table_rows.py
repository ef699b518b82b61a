"""C3: the SRCD table."""

from __future__ import annotations

from typing import Any

from cramlab.report.benchmark import ATTENTION_TOLERANCE, PAPER, RETRIEVAL_TOLERANCE
from cramlab.report.claims.evidence import ClaimRow, Evidence, Verdict, judge, over_seeds, shown
from cramlab.report.tables import Interval, seed_interval

PAPER_CONSOLIDATION = {"cram": 0.019, "cram-no-consolidation": 0.95, "seqboat": 0.98}
CONSOLIDATION_TOLERANCE = {"cram": 0.005, "cram-no-consolidation": 0.05, "seqboat": 0.05}
WORSE = 0.05  # dynamics errors further apart than this share are called different


def rows(evidence: Evidence) -> list[ClaimRow]:
    """A row a figure of the paper's table, at its length where we have it, else at 256 tokens."""
    made = []
    for mixer, paper in PAPER.items():
        size, group = _at_longest(evidence, mixer)
        at = "not run" if size is None else "2,048 tokens" if size == "paper" else "256 tokens"
        retrieval = over_seeds(group, "retrieval_acc", "n_queries")
        attention = over_seeds(group, "attention_frac", "n_tokens")
        command = f"cramlab run srcd_table/{mixer} --size {size or 'paper'} --out runs/results/srcd_table"
        made += [
            _row(f"{mixer}: retrieval, all queries ({at})", f"{paper.retrieval_acc:.2f}", retrieval, 4, len(group),
                 command, judge(retrieval, paper.retrieval_acc, RETRIEVAL_TOLERANCE)),
            _row(f"{mixer}: attention ({at})", f"{paper.attention_frac:.3f}", attention, 4, len(group),
                 command, judge(attention, paper.attention_frac, ATTENTION_TOLERANCE)),
        ]  # fmt: skip
    made += [_consolidation(evidence, mixer) for mixer in PAPER_CONSOLIDATION]
    return made + [_dynamics(evidence, mixer) for mixer in PAPER if mixer != "transformer"]


def _row(
    what: str, paper: str, ours: Interval | None, digits: int, n_runs: int, command: str, verdict: Verdict
) -> ClaimRow:
    text = shown(ours, digits, n_runs)
    return ClaimRow(claim="C3", what=what, paper=paper, ours=text, command=command, verdict=verdict)


def _at_longest(evidence: Evidence, mixer: str) -> tuple[str | None, list[dict[str, Any]]]:
    for size in ("paper", "small"):
        for experiment in ("srcd_table", "srcd"):
            if group := evidence.of(experiment, size, mixer):
                return size, group
    return None, []


def _consolidation(evidence: Evidence, mixer: str) -> ClaimRow:
    size, group = _at_longest(evidence, mixer)
    # A phase of decree that never ended would make a ratio of 1; SeqBoat's router is its own from the beginning.
    ratios = [run["consolidation_ratio"] for run in group if run["encoding_ended_step"] or mixer == "seqboat"]
    ratios = [ratio for ratio in ratios if ratio is not None]
    ours = seed_interval(ratios) if ratios else None
    paper = PAPER_CONSOLIDATION[mixer]
    return _row(
        f"{mixer}: attention at the end over that at the start", f"{paper}", ours, 4, len(ratios),
        f"cramlab run srcd_table/{mixer} --size {size or 'paper'} --out runs/results/srcd_table",
        judge(ours, paper, CONSOLIDATION_TOLERANCE[mixer]),
    )  # fmt: skip


def _dynamics(evidence: Evidence, mixer: str) -> ClaimRow:
    """The paper's errors have an unknown scale; their ratio has none."""
    size, group = _at_longest(evidence, mixer)
    controls = {
        (run["experiment"], run["seed"]): run["metrics"]["test"]["dynamics_mse"]
        for experiment in ("srcd_table", "srcd")
        for run in evidence.of(experiment, size, "transformer")
    }
    ratios = [
        run["metrics"]["test"]["dynamics_mse"] / controls[run["experiment"], run["seed"]]
        for run in group
        if (run["experiment"], run["seed"]) in controls
    ]
    ours = seed_interval(ratios) if ratios else None
    paper = PAPER[mixer].dynamics_mse / PAPER["transformer"].dynamics_mse
    aim = " (ours is to be no worse)" if mixer == "cram" else ""
    return _row(
        f"{mixer}: dynamics error over the Transformer's{aim}", f"{paper:.2f}", ours, 3, len(ratios),
        f"cramlab run srcd_table --size {size or 'paper'} --out runs/results/srcd_table", judge(ours, paper, WORSE),
    )  # fmt: skip
