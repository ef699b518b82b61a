"""C6: do a frozen memory and router need fewer reads on another task than training that task from scratch?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cramlab.report.claims.evidence import ClaimRow, Evidence, Verdict, markdown

COMMAND = "cramlab run transfer --size small --out runs/results/transfer"
LOST = 0.01  # retrieval that may be lost before a reduction counts as none
GOAL = 0.95  # validation retrieval up to which training reads are counted
CLAIMED = 0.48  # the least of the paper's reductions


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run on a target.

    Attributes:
        mixer: its name.
        target: of the transfer.
        way: what is carried over and trained.
        seed: of the run.
        retrieval_acc: test.
        attention_frac: test.
        oracle: least attention of the target.
        reads_to_goal: tokens read in training until validation retrieval reached `GOAL`; None if it never did.
        tokens_to_goal: tokens seen until then.
    """

    mixer: str
    target: str
    way: str
    seed: int
    retrieval_acc: float
    attention_frac: float
    oracle: float
    reads_to_goal: float | None
    tokens_to_goal: int | None


def row(run: dict[str, Any]) -> Row | None:
    """Of a run on a target; None for a source."""
    target, _, way = run.get("variant", "").partition("-")
    if target == "source":
        return None
    test = run["metrics"]["test"]
    reads, before, tokens = 0.0, 0, None
    for step in run["series"]:
        reads += (step["n_tokens"] - before) * step["train_reads_frac"]
        before = step["n_tokens"]
        if step["validation"] is not None and (step["validation"]["retrieval_acc"] or 0) >= GOAL:
            tokens = before
            break
    return Row(
        mixer=run["mixer"],
        target=target,
        way=way or "random router, from scratch",
        seed=run["seed"],
        retrieval_acc=test["retrieval_acc"],
        attention_frac=test["attention_frac"],
        oracle=run["oracle"]["attention_frac"],
        reads_to_goal=None if tokens is None else reads,
        tokens_to_goal=tokens,
    )


def found(evidence: Evidence) -> list[Row]:
    """All runs on targets."""
    return [r for r in map(row, evidence.of("transfer")) if r is not None]


def scratch_of(rows: list[Row], one: Row) -> Row | None:
    """The run from scratch that a row is compared with: of the same mixer, target and seed."""
    mixer = "cram" if one.mixer == "cram-random" else one.mixer
    like = [r for r in rows if (r.mixer, r.target, r.way, r.seed) == (mixer, one.target, "scratch", one.seed)]
    return like[0] if like else None


def reduction(one: Row, scratch: Row | None) -> float | None:
    """Share of the reads at test that transfer saves; None where accuracy was lost or nothing can be compared."""
    if scratch is None or one.retrieval_acc < scratch.retrieval_acc - LOST or not scratch.attention_frac:
        return None
    return 1 - one.attention_frac / scratch.attention_frac


def training_reduction(one: Row, scratch: Row | None) -> float | None:
    """Share of the training reads up to `GOAL` that transfer saves; None where either never came there."""
    if scratch is None or one.reads_to_goal is None or not scratch.reads_to_goal:
        return None
    return 1 - one.reads_to_goal / scratch.reads_to_goal


def table(evidence: Evidence) -> str:
    """A row a run."""
    rows = found(evidence)
    if not rows:
        return "No records yet.\n"
    columns = ("target", "mixer", "way", "seed", "retrieval", "attention_frac", "/ oracle", "fewer reads than scratch",
               f"training reads to {GOAL:.0%}", "fewer than scratch")  # fmt: skip
    cells = []
    for one in sorted(rows, key=lambda r: (r.target, r.mixer, r.way != "scratch", r.way, r.seed)):
        scratch = scratch_of(rows, one)
        saved, trained = reduction(one, scratch), training_reduction(one, scratch)
        lost = scratch is not None and one.retrieval_acc < scratch.retrieval_acc - LOST
        cells.append(
            (one.target, one.mixer, one.way, str(one.seed), f"{one.retrieval_acc:.4f}", f"{one.attention_frac:.4f}",
             f"{one.attention_frac / one.oracle:.2f}" if one.oracle else "-",
             "accuracy lost" if lost else "-" if saved is None or one is scratch else f"{saved:.0%}",
             "never" if one.reads_to_goal is None else f"{one.reads_to_goal:,.0f}",
             "-" if trained is None or one is scratch else f"{trained:.0%}")
        )  # fmt: skip
    return markdown(columns, cells)


def rows(evidence: Evidence) -> list[ClaimRow]:
    """Reads at test, which the claim is about, and reads in training, which it might have been about."""
    runs = found(evidence)
    return [
        _row("a frozen memory and router with a new head reads about half of what training from scratch ends at",
             runs, ("head",), reduction),
        _row("the same with embedding and head, or everything, trained on", runs, ("embedding", "all"), reduction),
        _row(f"ours: training reads up to {GOAL:.0%} retrieval", runs, ("head", "embedding", "all"),
             training_reduction),
    ]  # fmt: skip


def _row(what: str, runs: list[Row], ways: tuple[str, ...], saved_by: Any) -> ClaimRow:
    """Per target the best way; reproduced when most targets reach the paper's least reduction."""
    best: dict[str, tuple[float, str]] = {}
    targets = sorted({r.target for r in runs if r.mixer == "cram" and r.way in ways})
    for one in runs:
        saved = saved_by(one, scratch_of(runs, one))
        if one.mixer == "cram" and one.way in ways and saved is not None:
            best[one.target] = max(best.get(one.target, (-9.9, "")), (saved, one.way))
    parts = [
        f"{t}: {best[t][0]:.0%} ({best[t][1]})" if t in best else f"{t}: none, accuracy lost or not reached"
        for t in targets
    ]
    hits = sum(saved >= CLAIMED for saved, _ in best.values())
    verdict = Verdict.NOT_RUN
    if targets:
        verdict = Verdict.REPRODUCED if hits > len(targets) / 2 else Verdict.NOT_REPRODUCED
    return ClaimRow(claim="C6", what=what, paper="48 to 52% fewer; SeqBoat 0%", ours="; ".join(parts) or "-",
                    command=COMMAND, verdict=verdict)  # fmt: skip
