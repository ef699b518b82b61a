"""C4: whether attention falls in a sharp transition, where, and what triggers it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cramlab.report.intervals import seed_interval
from reproduction.analysis.bounds import fall_by_cause
from reproduction.analysis.transition import DetectorConfig, Transition, crossing, detect, level_at
from reproduction.claims.evidence import ClaimRow, Evidence, commands, standard
from reproduction.claims.verdict import Figure, Verdict, judge, most, run_share
from reproduction.pages import markdown

# A router that reads only queries reads 1 of 20 tokens without any memory; a semantic output of zero has q = exp(-1).
PAPER_FOLD, PAPER_QUALITY = Figure(value=37.8, without=20.0), Figure(value=0.83, without=math.exp(-1))
ALL_OF_IT = Figure(value=1.0, without=0.0)  # share of the fall that is consolidation
OURS, PAPERS = ("cram", "cram-no-encoding"), ("cram-paper", "cram-gumbel")  # routers
AT_QUERIES = 0.9  # share of queries above which a run has not consolidated
COMMAND = "cramlab run transition/{mixer} --size small --out runs/results/transition"  # what would be run first


@dataclass(frozen=True, kw_only=True)
class Course:
    """One run's attention over training.

    Attributes:
        group: experiment, size, mixer and variant, for the table.
        encoding_ended: step at which the encoding phase ended; 0: there was none.
        whole: transition of the whole series.
        routed: transition of the series after the encoding phase.
        quality: mean q of recurring queries at the transition of `whole`; None where unknown.
        quality_end: the same at the end of training.
        quality_crossed: step from which q stays above the paper's level; None if it never does.
        last: attention share of the last validation.
        query_frac: share of tokens that are queries.
        run: the record.
    """

    group: tuple[str, str, str, str]
    encoding_ended: int
    whole: Transition | None
    routed: Transition | None
    quality: float | None
    quality_end: float | None
    quality_crossed: float | None
    last: float
    query_frac: float
    run: dict[str, Any]

    @property
    def mixer(self) -> str:
        """Name of the router."""
        return self.group[2]


def course(run: dict[str, Any]) -> Course | None:
    """Course of a run; None with too few validations, or without attention."""
    rows = [row for row in run["series"] if row["validation"] is not None]
    steps = [row["step"] for row in rows]
    shares = [row["validation"]["attention_frac"] for row in rows]
    if len(rows) < 12 or min(shares) == max(shares):
        return None
    config = DetectorConfig(resolution=1 / max(rows[-1]["validation"].get("n_tokens") or 1, 1))
    had_phase = run["config"]["training"]["encoding_target"] > 0
    ended = (run["encoding_ended_step"] or 0) if had_phase else 0
    late = [i for i, step in enumerate(steps) if step > ended]
    whole = detect(steps, shares, config)
    known = [(row["step"], row.get("quality")) for row in run["series"]]
    quality = _smoothed([step for step, _ in known], [q for _, q in known])
    return Course(
        group=(run["experiment"], run["size"], run["mixer"], run.get("variant", "")),
        encoding_ended=ended,
        whole=whole,
        routed=detect([steps[i] for i in late], [shares[i] for i in late], config),
        quality=None if whole is None or quality is None else level_at(*quality, whole.step),
        quality_end=None if quality is None else float(np.mean(quality[1][-10:])),
        quality_crossed=None if quality is None else crossing(*quality, PAPER_QUALITY.value),
        last=shares[-1],
        query_frac=run["config"]["task"]["query_frac"],
        run=run,
    )


def _smoothed(steps: list[int], values: list[float | None]) -> tuple[list[int], list[float]] | None:
    """A running mean over five rows; None where q was not recorded."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if len(known) < 10:
        return None
    mean = np.convolve([v for _, v in known], np.ones(5) / 5, mode="valid")
    return [step for step, _ in known][2:-2], mean.tolist()


def courses(evidence: Evidence) -> list[Course]:
    """The runs that have a course, in the order of their experiments."""
    experiments = ("transition", "srcd", "srcd_table", "srcd_sweeps", "srcd_routers")
    found = [course(run) for name in experiments for run in evidence.of(name)]
    return [c for c in found if c is not None]


def table(found: Sequence[Course]) -> str:
    """Table with a row for each router, level of recurrence and encoding phase."""
    groups: dict[tuple[str, str, str, str], list[Course]] = {}
    for c in found:
        groups.setdefault(c.group, []).append(c)
    if not groups:
        return "No records yet.\n"
    columns = ("experiment", "size", "router", "variant", "runs", "encoding ends", "transitions", "at step",
               "10-90% width", "fold", "q there", "q at the end", "transitions after encoding")  # fmt: skip
    return markdown.table(columns, [_cells(group, members) for group, members in groups.items()])


def _cells(group: tuple[str, str, str, str], found: list[Course]) -> tuple[str, ...]:
    whole = [c.whole for c in found if c.whole is not None]
    return (
        *group,
        str(len(found)),
        "no such phase" if not any(c.encoding_ended for c in found) else _range([c.encoding_ended for c in found]),
        f"{len(whole)} of {len(found)}",
        "; ".join(f"{t.step:.0f} [{t.step_low:.0f}, {t.step_high:.0f}]" for t in whole) or "none",
        f"{'up to ' if any(t.unresolved for t in whole) else ''}{_range([t.width for t in whole])}",
        f"{_range([t.fold for t in whole], 1)}{', or more' if any(t.floored for t in whole) else ''}",
        _range([c.quality for c in found if c.quality is not None], 2),
        _range([c.quality_end for c in found if c.quality_end is not None], 2),
        f"{sum(c.routed is not None for c in found)} of {len(found)}",
    )


def _range(values: list[Any], digits: int = 0) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def rows(found: Sequence[Course]) -> list[ClaimRow]:
    """Rows on the parts of the claim, on the paper's task; CRAM's own router after an encoding phase unless stated."""
    judged = [c for c in found if c.mixer in OURS + PAPERS and standard(c.run)]
    ours = [c for c in judged if c.mixer == "cram" and c.encoding_ended]
    sharp = [c for c in ours if c.whole is not None]
    return [_fold(ours, sharp), _cause(ours, sharp), _emergent(judged), _quality(ours)]


def _row(what: str, paper: str, ours: str, used: list[Course], verdict: Verdict) -> ClaimRow:
    command = commands(c.run for c in used) or COMMAND.format(mixer="cram")
    return ClaimRow(claim="C4", what=what, paper=paper, ours=ours, command=command, verdict=verdict)


def _fold(ours: list[Course], sharp: list[Course]) -> ClaimRow:
    total = seed_interval([1 / c.last for c in ours if c.last]) if ours else None
    step = seed_interval([c.whole.fold for c in sharp if c.whole]) if sharp else None
    text = "-"
    if total is not None:
        text = f"{total.format(1)}x from all tokens to the end; the sharp step alone "
        text += "-" if step is None else f"{step.format(1)}x"
        text += f"; found in {len(sharp)} of {len(ours)} runs"
    verdict = Verdict.NOT_RUN if total is None else judge(step, PAPER_FOLD)
    return _row("attention falls 37.8x in one sharp transition", f"{PAPER_FOLD.value}x", text, ours, verdict)


def _cause(ours: list[Course], sharp: list[Course]) -> ClaimRow:
    """Row on the part of the fall that is consolidation, in logs, so that the parts add up."""
    fallen = [c for c in ours if c.last]
    parts = [fall_by_cause(before=1.0, query_frac=c.query_frac, after=c.last) for c in fallen]
    text, share = "-", None
    if parts:
        unasked, consolidated = (seed_interval([part[i] for part in parts]) for i in (0, 1))
        share = seed_interval([math.log(own) / math.log(other * own) for other, own in parts])
        # Interval of the step contains the first validation after the end of the encoding phase, or touches it.
        at_the_end = sum(c.whole.step_low <= c.encoding_ended + _spacing(c) for c in sharp if c.whole)
        text = (
            f"{unasked.mean:.0f}x is reads that nobody asked for (all tokens to queries), {consolidated.format(2)}x is "
            f"consolidation, {share.format(2)} of the fall in logs; in {at_the_end} of {len(sharp)} runs the step is "
            "where the encoding phase ends"
        )
    return _row("the fall is consolidation", "all of it", text, fallen, judge(share, ALL_OF_IT))


def _spacing(c: Course) -> float:
    assert c.whole is not None
    return c.whole.step_high - c.whole.step_low


def _emergent(found: list[Course]) -> ClaimRow:
    """Row on a transition that no schedule triggers: after an encoding phase, or without one.

    The claim is about the paper's routers, so most of their runs must show it; our router is reported beside them.
    """
    paper = [c for c in found if c.mixer in PAPERS]
    ours = [c for c in found if c.mixer in OURS]
    hits = [c for c in paper if c.routed is not None]
    text, verdict = "-", Verdict.NOT_RUN
    share = run_share(len(hits), len(paper))
    if share is not None:
        with_phase = [c for c in paper if c.encoding_ended]
        later = [c.routed.step - c.encoding_ended for c in with_phase if c.routed]
        text = (
            f"the paper's routers: {_shown(with_phase)} with an encoding phase"
            f"{f', {_range(later)} steps after it,' if later else ''} and "
            f"{_shown([c for c in paper if not c.encoding_ended])} without, {share.format(2)} of all; of these "
            f"{sum(c.last > AT_QUERIES * c.query_frac for c in hits)} end at the share of queries, so that nothing was "
            f"consolidated; our router: {_shown(ours)}"
        )
        verdict = most(len(hits), len(paper))
    elif ours:
        text = f"our router: {_shown(ours)}"
    return _row("the transition is emergent, not set off by a schedule", "step ~3100", text, paper or ours, verdict)


def _shown(courses: list[Course]) -> str:
    return f"{sum(c.routed is not None for c in courses)} of {len(courses)} runs"


def _quality(ours: list[Course]) -> ClaimRow:
    known = [c.quality for c in ours if c.quality is not None]
    mean = seed_interval(known) if known else None
    ends = [c.quality_end for c in ours if c.quality_end is not None]
    crossed = sum(c.quality_crossed is not None for c in ours if c.quality_end is not None)
    text = "-"
    if mean is not None:
        text = f"{mean.format(2)} at {len(known)} transitions; q ends at {min(ends):.2f} to {max(ends):.2f} and stays "
        text += f"above {PAPER_QUALITY.value} in {crossed} of {len(ends)} runs"
    return _row("the transition comes when mean q crosses 0.83", f"{PAPER_QUALITY.value}", text, ours,
                judge(mean, PAPER_QUALITY))  # fmt: skip
