"""C6: whether a frozen memory and router need fewer reads on another task than training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cramlab.report.intervals import seed_interval
from reproduction.claims.evidence import ClaimRow, Evidence
from reproduction.claims.verdict import Verdict, at_least
from reproduction.pages import markdown

COMMAND = "cramlab run transfer --size small --out runs/results/transfer"
OTHER_FACTS = ("recall", "rebound", "patterns", "copy")  # the paper's kind of target
SAME_FACTS = ("relabel", "queries", "laws")  # ours: the facts that the source has consolidated are useful
SCRATCH = ("scratch", "no_encoding")  # with all tokens read at first, and without
LOST = 0.01  # loss of retrieval accuracy beyond which a reduction does not count
LOST_DYNAMICS = 0.05  # relative increase of the squared error of levels beyond which it does not count
GOAL = 0.95  # validation retrieval up to which training reads are counted
SPARSE = 1.25  # attention over the oracle's, at most, of the second goal
CLAIMED = 0.48  # the least of the paper's reductions
NOTHING = 0.1  # a reduction below it counts as none
OURS, ENOUGH = 0.60, 3  # our own goal: this reduction, on this number of targets


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run on a target.

    Attributes:
        mixer: name of the mixer.
        target: target of the transfer.
        way: parts that are transferred and trained.
        seed: seed of the run.
        retrieval_acc: retrieval accuracy on the test split.
        dynamics_mse: squared error of levels on the test split.
        attention_frac: share of tokens that read on the test split.
        oracle: least attention of the target.
        reads: number of tokens read in training.
        reads_to_goal: number read until validation retrieval reached `GOAL`; None if it never did.
        reads_to_sparse: number read until retrieval had, and attention was within `SPARSE` of the oracle's; None if
            this never happened.
        n_tokens: number of tokens seen in training.
    """

    mixer: str
    target: str
    way: str
    seed: int
    retrieval_acc: float
    dynamics_mse: float
    attention_frac: float
    oracle: float
    reads: float
    reads_to_goal: float | None
    reads_to_sparse: float | None
    n_tokens: int


def row(run: dict[str, Any]) -> Row | None:
    """A run on a target; None for a source."""
    target, _, way = run.get("variant", "").partition("-")
    if target == "source":
        return None
    test, oracle = run["metrics"]["test"], run["oracle"]["attention_frac"]
    reads, before = 0.0, 0
    goal: float | None = None
    sparse: float | None = None
    for step in run["series"]:
        reads += (step["n_tokens"] - before) * step["train_reads_frac"]
        before = step["n_tokens"]
        if step["validation"] is None or (step["validation"]["retrieval_acc"] or 0) < GOAL:
            continue
        goal = reads if goal is None else goal
        if sparse is None and step["validation"]["attention_frac"] <= SPARSE * oracle:
            sparse = reads
    return Row(
        mixer=run["mixer"],
        target=target,
        way=way or "random router",
        seed=run["seed"],
        retrieval_acc=test["retrieval_acc"],
        dynamics_mse=test["dynamics_mse"],
        attention_frac=test["attention_frac"],
        oracle=oracle,
        reads=run["train_reads_frac"] * run["n_train_tokens"],
        reads_to_goal=goal,
        reads_to_sparse=sparse,
        n_tokens=run["n_train_tokens"],
    )


def on_targets(evidence: Evidence) -> list[Row]:
    """All runs on targets."""
    return [r for r in map(row, evidence.of("transfer")) if r is not None]


def from_scratch(rows: Sequence[Row], one: Row) -> list[Row]:
    """The runs from scratch of the same mixer, target and seed, in the order of `SCRATCH`."""
    mixer = "cram" if one.mixer == "cram-random" else one.mixer
    like = [r for r in rows if (r.mixer, r.target, r.seed) == (mixer, one.target, one.seed) and r.way in SCRATCH]
    return sorted(like, key=lambda r: SCRATCH.index(r.way))


def scratch_of(rows: Sequence[Row], one: Row) -> Row | None:
    """The run from scratch that a row's accuracy and attention are compared with."""
    return next(iter(from_scratch(rows, one)), None)


def lost(one: Row, scratch: Row) -> bool:
    """Whether retrieval or forecast is worse than in the run from scratch."""
    return (
        one.retrieval_acc < scratch.retrieval_acc - LOST
        or one.dynamics_mse > (1 + LOST_DYNAMICS) * scratch.dynamics_mse
    )


def reduction(rows: Sequence[Row], one: Row) -> float | None:
    """Share of the reads at test that a run saves; None if accuracy was lost or there is no run to compare with."""
    scratch = scratch_of(rows, one)
    if scratch is None or lost(one, scratch) or not scratch.attention_frac:
        return None
    return 1 - one.attention_frac / scratch.attention_frac


def _training_reduction(name: str) -> Callable[[Sequence[Row], Row], float | None]:
    def saved(rows: Sequence[Row], one: Row) -> float | None:
        """Share of the training reads up to a goal that a run saves, compared with the cheaper way from scratch.

        If that way never reached the goal, all of its reads count, which is less than it would have needed. None if
        the run itself did not reach it, or lost accuracy in the end.
        """
        own: float | None = getattr(one, name)
        others = from_scratch(rows, one)
        if own is None or not others or lost(one, others[0]):
            return None
        needed = [value for r in others if (value := getattr(r, name)) is not None]
        least = min(needed) if needed else max(r.reads for r in others)
        return 1 - own / least if least else None

    return saved


to_goal = _training_reduction("reads_to_goal")
to_sparse = _training_reduction("reads_to_sparse")


def table(found: Sequence[Row], evidence: Evidence) -> str:
    """Table with a row for each run on a target, and a line on the runs on the source."""
    if not found:
        return "No records yet.\n"
    columns = ("target", "mixer", "way", "seed", "retrieval", "level error / scratch", "attention_frac", "/ oracle",
               "fewer reads than scratch", f"training reads to {GOAL:.0%}", "fewer",
               f"to {GOAL:.0%} and {SPARSE:g} x oracle", "fewer")  # fmt: skip
    order = OTHER_FACTS + SAME_FACTS
    cells = []
    for one in sorted(found, key=lambda r: (order.index(r.target), r.mixer, r.way not in SCRATCH, r.way, r.seed)):
        scratch = scratch_of(found, one)
        gone = scratch is not None and lost(one, scratch)
        ratio = "-" if scratch is None else f"{one.dynamics_mse / scratch.dynamics_mse:.2f}"
        cells.append(
            (one.target, one.mixer, one.way, str(one.seed), f"{one.retrieval_acc:.4f}", ratio,
             f"{one.attention_frac:.4f}", f"{one.attention_frac / one.oracle:.2f}" if one.oracle else "-",
             "accuracy lost" if gone else _percent(None if one is scratch else reduction(found, one)),
             _count(one.reads_to_goal), _percent(None if one.way in SCRATCH else to_goal(found, one)),
             _count(one.reads_to_sparse), _percent(None if one.way in SCRATCH else to_sparse(found, one)))
        )  # fmt: skip
    return markdown.table(columns, cells) + "\n" + _sources(evidence)


def _sources(evidence: Evidence) -> str:
    runs = [run for run in evidence.of("transfer") if run["variant"] == "source"]
    lines = [
        f"{run['mixer']} seed {run['seed']} {run['train_reads_frac'] * run['n_train_tokens']:,.0f} reads of "
        f"{run['n_train_tokens']:,} tokens, at the end attention {run['metrics']['test']['attention_frac']:.4f} and "
        f"retrieval {run['metrics']['test']['retrieval_acc']:.4f}"
        for run in runs
    ]
    return f"Sources: {'; '.join(lines)}.\n" if lines else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _count(reads: float | None) -> str:
    return "never" if reads is None else f"{reads:,.0f}"


Saved = Callable[[Sequence[Row], Row], float | None]


@dataclass(frozen=True)
class Saving:
    """The savings of one way on one target, run by run; None if accuracy was lost or the goal missed."""

    target: str
    way: str
    shares: Sequence[float | None]

    def __str__(self) -> str:
        """Mean and interval in per cent, or the number of runs that lost accuracy."""
        known = self._known()
        if len(known) < len(self.shares):
            return f"none in {len(self.shares) - len(known)} of {len(self.shares)}"
        return f"{seed_interval([100 * s for s in known]).format(0)}%"

    def at_least(self, share: float) -> Verdict:
        """Verdict by the whole interval over runs; a run that lost accuracy saves nothing.

        A single run is undecided.
        """
        known = self._known()
        if len(self.shares) < 2:
            return Verdict.UNDECIDED
        return Verdict.NOT_REPRODUCED if len(known) < len(self.shares) else at_least(seed_interval(known), share)

    def _known(self) -> list[float]:
        return [s for s in self.shares if s is not None]


def over_seeds(
    rows: Sequence[Row], mixer: str, targets: Sequence[str], ways: Sequence[str], saved_by: Saved
) -> list[Saving]:
    """Savings by target and way; every way is shown."""
    made = []
    for target in targets:
        for way in ways:
            group = [r for r in rows if (r.mixer, r.target, r.way) == (mixer, target, way)]
            group = [r for r in group if scratch_of(rows, r) is not None]
            if group:
                made.append(Saving(target, way, [saved_by(rows, r) for r in group]))
    return made


def rows(runs: Sequence[Row]) -> list[ClaimRow]:
    """Rows on reads at test, of which the paper speaks, and on reads in training, of which it might have spoken."""
    every = OTHER_FACTS + SAME_FACTS
    return [
        _row("a frozen memory and router with a new head reads about half of what training from scratch ends at",
             "48 to 52% fewer", runs, "cram", OTHER_FACTS, ("head",), reduction, _most),
        _row("the same with embedding and head, or everything, trained on",
             "48 to 52% fewer", runs, "cram", OTHER_FACTS, ("embedding", "all"), reduction, _most),
        _row("a frozen router that never learned saves nothing", "no such control", runs, "cram", OTHER_FACTS,
             ("untrained",), reduction, _none),
        _row("a random router at the carried one's rate saves nothing", "no such control", runs, "cram-random",
             OTHER_FACTS, ("random router",), reduction, _none),
        _row("SeqBoat's router, carried with a new head, saves nothing", "0%", runs, "seqboat", OTHER_FACTS, ("head",),
             reduction, _none),
        _row(f"ours: training reads up to {GOAL:.0%} retrieval, {OURS:.0%} fewer on {ENOUGH} targets",
             "not counted", runs, "cram", every, ("head", "all"), to_goal, _aim),
        _row(f"ours: training reads up to {GOAL:.0%} retrieval at {SPARSE:g} x the oracle's attention, {OURS:.0%} "
             f"fewer on {ENOUGH} targets",
             "not counted", runs, "cram", every, ("head", "all"), to_sparse, _aim),
    ]  # fmt: skip


def _targets(savings: Sequence[Saving], least: float) -> tuple[int, int, int]:
    """Numbers of targets: on which a way saves `least`, on which no way that was run twice does, and of all."""
    by_target: dict[str, set[Verdict]] = {}
    for saving in savings:
        by_target.setdefault(saving.target, set()).add(saving.at_least(least))
    saved = sum(Verdict.REPRODUCED in found for found in by_target.values())
    refuted = sum(Verdict.REPRODUCED not in found and Verdict.NOT_REPRODUCED in found for found in by_target.values())
    return saved, refuted, len(by_target)


def _most(savings: Sequence[Saving]) -> Verdict:
    saved, refuted, n = _targets(savings, CLAIMED)
    return _decided(saved > n / 2, refuted >= n / 2)


def _none(savings: Sequence[Saving]) -> Verdict:
    saved, refuted, n = _targets(savings, NOTHING)
    return _decided(refuted == n, saved > 0)


def _aim(savings: Sequence[Saving]) -> Verdict:
    saved, refuted, n = _targets(savings, OURS)
    return _decided(saved >= ENOUGH, n - refuted < ENOUGH)


def _decided(shown: bool, refuted: bool) -> Verdict:
    return Verdict.REPRODUCED if shown else Verdict.NOT_REPRODUCED if refuted else Verdict.UNDECIDED


def _row(
    what: str, paper: str, runs: Sequence[Row], mixer: str, targets: Sequence[str], ways: Sequence[str],
    saved_by: Saved, judge: Callable[[Sequence[Saving]], Verdict],
) -> ClaimRow:  # fmt: skip
    savings = over_seeds(runs, mixer, targets, ways, saved_by)
    text = "; ".join(f"{s.target}{f' ({s.way})' if len(ways) > 1 else ''}: {s}" for s in savings)
    verdict = judge(savings) if savings else Verdict.NOT_RUN
    return ClaimRow(claim="C6", what=what, paper=paper, ours=text or "-", command=COMMAND, verdict=verdict)
