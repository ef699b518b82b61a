"""C7: whether the share of reads at the k-th encounter is a power law, its exponent, and that of people."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cramlab.report.intervals import Interval, seed_interval
from reproduction.analysis.encounters import Encounters, PracticeSummary, summarise, threshold_gate
from reproduction.analysis.human import TABLES, HumanFit, fit_table
from reproduction.analysis.practice import PracticeFit, aic_weights, compare
from reproduction.claims.evidence import ClaimRow, Evidence, standard
from reproduction.claims.verdict import Figure, Verdict, at_most, every, judge
from reproduction.pages import markdown

# A flat curve has the exponent 0. For the faster memory, the rise from 0.43 is the claim.
PAPER_EXPONENT, PAPER_FAST = Figure(value=0.43, without=0.0), Figure(value=0.71, without=0.43)
PAPER_PEOPLE = 0.4, 0.5
EQUAL_AIC = 2.0  # difference up to which two laws count as equally good
METHOD = "likelihood"  # by which rows are judged; the others are shown beside it
COMMAND = "cramlab run {0}/{2} --size {1} --out runs/results/{0}"
NONE_YET = ("transition", "small", "cram", "")  # what would be run first
EXPERIMENTS = ("transition", "srcd", "srcd_table")  # all from fresh weights
# Of `transfer`: patterns that a trained router meets for the first time, and the same patterns met by a fresh one.
LATER, AFRESH = "patterns-all", "patterns-no_encoding"
LATER_COMMAND = "cramlab run transfer/cram --size small --out runs/results/transfer"
MIXERS = ("cram", "cram-no-encoding", "cram-fast-semantic", "cram-gumbel", "price-only")
N_PATTERNS = 12
AFTER = ", after encoding"  # of rows that leave out the encounters of the encoding phase
# Rates and spreads of the null that are shown.
NULLS = tuple((rate, spread) for rate in (0.02, 0.2, 1.0) for spread in (0.5, 2.0))


Key = tuple[str, ...]  # experiment, size, mixer and variant


@dataclass(frozen=True)
class Logs:
    """Practice logs of runs that differ in their seeds.

    Attributes:
        runs: the records.
        after: encounters of each pattern that are left out, as most of them fall into the encoding phase.
    """

    runs: Sequence[dict[str, Any]]
    after: int = 0

    @functools.cached_property
    def summary(self) -> PracticeSummary:
        """Curve and fitted laws, which take seconds and are computed once."""
        encounters = [Encounters.of_record(run) for run in self.runs]
        return summarise([one.after(self.after) for one in encounters if one is not None], n_patterns=N_PATTERNS)


def logs(evidence: Evidence) -> dict[Key, Logs]:
    """Practice logs with all encounters, and with those after the encoding phase where enough are left."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for run in [run for experiment in (*EXPERIMENTS, "transfer") for run in evidence.of(experiment)]:
        if run.get("practice") and is_read(run):
            key = (run["experiment"], run["size"], run["mixer"], run.get("variant", ""))
            groups.setdefault(key, []).append(run)
    found: dict[Key, Logs] = {}
    for key, runs in groups.items():
        found[key] = Logs(runs)
        forced = max(encounters_in_encoding(run) for run in runs)
        if forced and sum(first > forced for first in runs[0]["practice"]["first_encounter"]) >= 4:
            found[(*key[:3], key[3] + AFTER)] = Logs(runs, after=round(forced))
    return found


def is_read(run: dict[str, Any]) -> bool:
    """Whether the practice log of a run enters a row, the table or the figure."""
    later = run["experiment"] == "transfer" and run["variant"] in (LATER, AFRESH)
    return (later or run["experiment"] in EXPERIMENTS) and run["mixer"] in MIXERS and standard(run)


def encounters_in_encoding(run: dict[str, Any]) -> float:
    """Mean number of encounters of a pattern during the encoding phase, in which every token is forced to read."""
    ended, task = run["encoding_ended_step"] or 0, run["config"]["task"]
    tokens = max((row["n_tokens"] for row in run["series"] if row["step"] <= ended), default=0)
    return tokens * task["query_frac"] * task["recurring_frac"] / task["n_patterns"]


@functools.cache
def human() -> Mapping[str, HumanFit]:
    """The same laws on the tables of people."""
    return {name: fit_table(people) for name, people in TABLES.items()}


@functools.cache
def null(rate: float, spread: float) -> tuple[float, str]:
    """Exponent of the power law, and the best law, for the average of threshold gates over exponential learning."""
    k = np.unique(np.round(np.geomspace(1, 2000, 24)))
    fits = compare(*threshold_gate(k, rate_spread=spread, n_patterns=400, rate=rate).pooled())
    return fits["power"].parameters["exponent"], next(iter(fits))


def _laws(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{law} {share:.2f}" for law, share in sorted(shares.items(), key=lambda x: -x[1])) or "-"


def exponent(found: PracticeSummary, method: str = METHOD) -> Interval:
    """Mean over seeds, each fitted by itself, with its interval."""
    return seed_interval([float(value) for value in found.exponents[method]])


def table(found: Mapping[Key, Logs]) -> str:
    """Table of models, people and the null hypothesis."""
    columns = ("whose", "runs", "power exponent: likelihood", "least squares", "line through the logs",
               "best law by run", "best law of one pattern", "parameters of the best of all runs")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for key, group in found.items():
        summary = group.summary
        best = next(iter(summary.together.values()))
        rows.append((" ".join(filter(None, key)), str(len(group.runs)),
                     *(exponent(summary, method).format(2) for method in summary.exponents), _laws(summary.best_by_run),
                     _laws(summary.by_pattern), _parameters(best)))  # fmt: skip
    for name, fitted in human().items():
        best = next(iter(fitted.fits.values()))
        rows.append((f"people: {name}", "-", "-", "-", _people(fitted),
                     "AICc weights: " + _laws(aic_weights(fitted.fits)), "-", _parameters(best)))  # fmt: skip
    for rate, spread in NULLS:
        value, law = null(rate, spread)
        rows.append((f"null: rate {rate:g}, spread {spread:g}", "-", f"{value:.2f}", "-", "-", law, "step", "-"))
    return markdown.table(columns, rows)


def _people(fitted: HumanFit) -> str:
    value, low, high = fitted.exponent
    return Interval(mean=value, low=low, high=high).format(2)


def _parameters(found: PracticeFit) -> str:
    """Parameters as text; those that a bound has set, instead of the observations, are marked."""
    return f"{found.law}: " + ", ".join(
        f"{name} {value:.3g}{' (at its bound)' if name in found.at_bounds else ''}"
        for name, value in found.parameters.items()
    )


def rows(found: Mapping[Key, Logs]) -> list[ClaimRow]:
    """Rows on the exponent, the law, the faster semantic memory, and people.

    They take the experiment and size with most seeds, and judge the faster memory at the same; all others are in the
    table.
    """
    ours = [key for key in found if key[2] == "cram" and not key[3].endswith(("no_encoding", LATER, AFTER))]
    key = max(ours, key=lambda key: len(found[key].runs), default=NONE_YET)
    fast = (*key[:2], "cram-fast-semantic", key[3])

    main, command, fast_command = found.get(key), COMMAND.format(*key), COMMAND.format(*fast)
    people = human()
    text = "; ".join(f"{name} {_people(fit)}" for name, fit in people.items())
    return [
        _exponent_row("P(read at the k-th encounter) falls as k^-0.43", PAPER_EXPONENT, main, command),
        _law_row(main, command),
        _exponent_row(
            "the same for patterns first met after the router has learned",
            PAPER_EXPONENT,
            next((found[key] for key in found if key[3] == LATER), None),
            LATER_COMMAND,
        ),
        _exponent_row("10x semantic learning rate: exponent 0.71", PAPER_FAST, found.get(fast), fast_command),
        ClaimRow(
            claim="C7",
            what="people's exponent is 0.4 to 0.5",
            paper="0.4 to 0.5",
            ours=f"Ebbinghaus' tables, a line through the logs: {text}",
            command="python -m reproduction.pages.claims results",
            verdict=every(_in_range(fit.exponent) for fit in people.values()),
        ),
    ]


def _in_range(value: tuple[float, float, float]) -> Verdict:
    """The verdict: an interval outside the paper's range refutes it, one inside confirms it."""
    (_, low, high), (least, highest) = value, PAPER_PEOPLE
    if low > highest or high < least:
        return Verdict.NOT_REPRODUCED
    return Verdict.REPRODUCED if least <= low and high <= highest else Verdict.UNDECIDED


def _exponent_row(what: str, paper: Figure, found: Logs | None, command: str) -> ClaimRow:
    """Row on an exponent. Where methods disagree, the law does not hold; the exponent by likelihood is judged."""
    ours, text = None, "-"
    if found is not None:
        n_runs, summary = len(found.runs), found.summary
        ours = exponent(summary)
        others = [f"{method} {exponent(summary, method).format(2)}" for method in summary.exponents if method != METHOD]
        text = f"{METHOD}, each seed by itself and no probability above 1: {ours.format(2)}, {n_runs} run"
        text += f"{'s' if n_runs > 1 else ''}; by other methods: {', '.join(others)}"
    theirs = f"{paper.value} +- 0.04" if paper is PAPER_EXPONENT else f"{paper.value}"
    return ClaimRow(claim="C7", what=what, paper=theirs, ours=text, command=command, verdict=judge(ours, paper))


def _law_row(found: Logs | None, command: str) -> ClaimRow:
    """Row on the best law, run by run: the trials of a run share its weights, so a sum over runs would inflate AIC."""
    text, verdict = "-", Verdict.NOT_RUN
    if found is not None:
        n_runs, summary = len(found.runs), found.summary
        worse = seed_interval([fits["power"].aic - min(f.aic for f in fits.values()) for fits in summary.by_run])
        text = (
            f"best law by run: {_laws(summary.best_by_run)}, {n_runs} run{'s' if n_runs > 1 else ''}; the power law is "
            f"worse by {_thousands(worse)} in AIC; single patterns: {_laws(summary.by_pattern)}"
        )
        verdict = at_most(worse, EQUAL_AIC)
    return ClaimRow(claim="C7", what="the practice curve is a power law", paper="power law", ours=text,
                    command=command, verdict=verdict)  # fmt: skip


def _thousands(value: Interval) -> str:
    ends = "" if value.low is None else f" [{value.low:,.0f}, {value.high:,.0f}]"
    return f"{value.mean:,.0f}{ends}"
