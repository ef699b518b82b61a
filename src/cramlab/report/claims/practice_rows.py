"""C7: is the share of reads at the k-th encounter a power law, with which exponent, and what do people do?"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cramlab.analysis.human import TABLES, HumanFit, fit_table
from cramlab.analysis.practice import Encounters, PracticeSummary, aic_weights, compare, summarise, threshold_gate
from cramlab.report.claims.evidence import ClaimRow, Evidence, Verdict, judge, markdown
from cramlab.report.tables import Interval

PAPER_EXPONENT, PAPER_FAST = 0.43, 0.71
TOLERANCE = 0.04
COMMAND = "cramlab run {0}/{2} --size {1} --out runs/results/{0}"
NONE_YET = ("transition", "small", "cram", "")  # what would be run first
EXPERIMENTS = ("transition", "srcd", "srcd_table")  # all from fresh weights
# Of `transfer`: patterns that a trained router meets for the first time, and the same patterns met by a fresh one.
LATER, AFRESH = "patterns-all", "patterns-no_encoding"
LATER_COMMAND = "cramlab run transfer/cram --size small --out runs/results/transfer"
MIXERS = ("cram", "cram-no-encoding", "cram-fast-semantic", "cram-gumbel", "price-only")
N_RESAMPLES, N_PATTERNS = 100, 12
AFTER = ", after encoding"  # of rows that leave out what was read by decree
# Rates and spreads of the null that are shown.
NULLS = tuple((rate, spread) for rate in (0.02, 0.2, 1.0) for spread in (0.5, 2.0))


def summaries(evidence: Evidence) -> dict[tuple[str, ...], tuple[int, PracticeSummary]]:
    """By experiment, size, mixer and variant: number of runs and what their practice logs say."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    later = [run for run in evidence.of("transfer") if run["variant"] in (LATER, AFRESH)]
    for run in [run for experiment in EXPERIMENTS for run in evidence.of(experiment)] + later:
        if run["mixer"] in MIXERS and run.get("practice") and run["config"]["task"]["recurring_frac"] == 0.7:
            key = (run["experiment"], run["size"], run["mixer"], run.get("variant", ""))
            groups.setdefault(key, []).append(run)
    found = {}
    for key, runs in groups.items():
        logs = [run["practice"] for run in runs]
        found[key] = (len(runs), _summary(json.dumps(logs), 0))
        decreed = max(encounters_in_encoding(run) for run in runs)
        if decreed and sum(first > decreed for first in logs[0]["first_encounter"]) >= 4:
            found[(*key[:3], key[3] + AFTER)] = (len(runs), _summary(json.dumps(logs), round(decreed)))
    return found


def encounters_in_encoding(run: dict[str, Any]) -> float:
    """How often a pattern was met, on average, while everything was read by decree."""
    ended, task = run["encoding_ended_step"] or 0, run["config"]["task"]
    tokens = max((row["n_tokens"] for row in run["series"] if row["step"] <= ended), default=0)
    return tokens * task["query_frac"] * task["recurring_frac"] / task["n_patterns"]


@functools.lru_cache(maxsize=64)
def _summary(logs: str, after: int) -> PracticeSummary:
    """Fits take seconds, and table, rows and figure ask for the same ones."""
    runs = [Encounters.of_record({"practice": log}) for log in json.loads(logs)]
    late = [run.after(after) for run in runs if run is not None]
    return summarise(late, n_resamples=N_RESAMPLES, n_patterns=N_PATTERNS)


@functools.cache
def human() -> Mapping[str, HumanFit]:
    """The same laws on the tables of people."""
    return {name: fit_table(table) for name, table in TABLES.items()}


@functools.cache
def null(rate: float, spread: float) -> tuple[float, str]:
    """Exponent of the power law, and the best law, on the average of a threshold gate over exponential learning."""
    k = np.unique(np.round(np.geomspace(1, 2000, 24)))
    fits = compare(*threshold_gate(k, rate_spread=spread, n_patterns=400, rate=rate).pooled())
    return fits["power"].parameters["exponent"], next(iter(fits))


def _laws(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{law} {share:.2f}" for law, share in sorted(shares.items(), key=lambda x: -x[1])) or "-"


def _exponent(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def table(evidence: Evidence) -> str:
    """Models, people and the null, a row each."""
    columns = ("whose", "runs", "power exponent", "best law", "best law, resampled", "best law of one pattern",
               "parameters of the best")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for key, (n_runs, found) in summaries(evidence).items():
        best = next(iter(found.averaged))
        rows.append((" ".join(filter(None, key)), str(n_runs), _exponent(found.exponent), best, _laws(found.chosen),
                     _laws(found.by_pattern), _parameters(found.averaged[best].parameters)))  # fmt: skip
    for name, fitted in human().items():
        best = next(iter(fitted.fits))
        rows.append((f"people: {name}", "-", _exponent(fitted.exponent), best,
                     "AICc weights: " + _laws(aic_weights(fitted.fits)), "-",
                     _parameters(fitted.fits[best].parameters)))  # fmt: skip
    for rate, spread in NULLS:
        exponent, best = null(rate, spread)
        rows.append((f"null: rate {rate:g}, spread {spread:g}", "-", f"{exponent:.2f}", best, "-", "step", "-"))
    return markdown(columns, rows)


def _parameters(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def rows(evidence: Evidence) -> list[ClaimRow]:
    """Exponent, law, the faster semantic memory, and people.

    The row is that of the experiment and size with most seeds, and the faster memory is judged at the same; all
    others are in the table.
    """
    found = summaries(evidence)
    ours = [key for key in found if key[2] == "cram" and not key[3].endswith(("no_encoding", LATER, AFTER))]
    key = max(ours, key=lambda key: found[key][0], default=NONE_YET)
    fast = (*key[:2], "cram-fast-semantic", key[3])
    main, command, fast_command = found.get(key), COMMAND.format(*key), COMMAND.format(*fast)
    tables = human()
    text = "; ".join(f"{name} {_exponent(fit.exponent)}" for name, fit in tables.items())
    inside = [fit.exponent[1] <= 0.5 and fit.exponent[2] >= 0.4 for fit in tables.values()]
    return [
        _exponent_row("P(read at the k-th encounter) falls as k^-.43", PAPER_EXPONENT, main, command),
        _law_row(main, command),
        _exponent_row(
            "the same for patterns first met after the router has learned",
            PAPER_EXPONENT,
            next((found[key] for key in found if key[3] == LATER), None),
            LATER_COMMAND,
        ),
        _exponent_row("10x semantic learning rate: exponent .71", PAPER_FAST, found.get(fast), fast_command),
        ClaimRow(
            claim="C7",
            what="people's exponent is .4 to .5",
            paper=".4 to .5",
            ours=f"Ebbinghaus' tables: {text}",
            command="python tools/claims.py results",
            verdict=Verdict.REPRODUCED if all(inside) else Verdict.NOT_REPRODUCED,
        ),
    ]


def _exponent_row(what: str, paper: float, found: tuple[int, PracticeSummary] | None, command: str) -> ClaimRow:
    ours, text = None, "-"
    if found is not None:
        ours = Interval(mean=found[1].exponent[0], low=found[1].exponent[1], high=found[1].exponent[2])
        text = f"{ours.format(2)}, {found[0]} run{'s' if found[0] > 1 else ''}"
    return ClaimRow(claim="C7", what=what, paper=f"{paper} +- .04" if paper == PAPER_EXPONENT else f"{paper}",
                    ours=text, command=command, verdict=judge(ours, paper, TOLERANCE))  # fmt: skip


def _law_row(found: tuple[int, PracticeSummary] | None, command: str) -> ClaimRow:
    text, verdict = "-", Verdict.NOT_RUN
    if found is not None:
        fits = found[1].averaged
        best = next(iter(fits))
        worse = fits["power"].aic - fits[best].aic
        text = f"{best}, AIC weight {found[1].weights[best]:.2f}; the power law is worse by {worse:,.0f} in AIC; "
        text += f"single patterns: {_laws(found[1].by_pattern)}"
        verdict = Verdict.REPRODUCED if best == "power" else Verdict.NOT_REPRODUCED
    return ClaimRow(claim="C7", what="the practice curve is a power law", paper="power law", ours=text,
                    command=command, verdict=verdict)  # fmt: skip
