"""Practice logs of runs: reads at the k-th encounter of a pattern, and fits of the laws of practice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reproduction.analysis.practice import LAWS, Binomial, PracticeFit, compare, least_squares_exponent, line_exponent


@dataclass(frozen=True)
class Encounters:
    """The practice log of one run: `k` (bins,), `hits` and `trials` (patterns, bins)."""

    k: np.ndarray
    hits: np.ndarray
    trials: np.ndarray

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Encounters | None:
        """Loads a run's record; None if it has no practice log."""
        practice = record.get("practice")
        if not practice:
            return None
        firsts = np.array(practice["first_encounter"], dtype=float)
        # Bins double every second time; a bin stands for its geometric middle.
        lasts = np.append(firsts[1:] - 1, max(firsts[-1], np.floor(firsts[-1] * 4 / 3)))
        return cls(np.sqrt(firsts * lasts), np.array(practice["read"]), np.array(practice["n"], dtype=float))

    def pooled(self, patterns: Sequence[int] | None = None) -> tuple[np.ndarray, Binomial]:
        """Sums over all or some patterns: encounters, and the binomial counts of reads."""
        chosen = slice(None) if patterns is None else list(patterns)
        hits, trials = self.hits[chosen].sum(axis=0), self.trials[chosen].sum(axis=0)
        met = trials > 0
        return self.k[met], Binomial(hits[met], trials[met])

    def after(self, encounter: float) -> Encounters:
        """The encounters after a given one, such as the last of the encoding phase; encounters keep their number."""
        late = self.k > encounter
        return Encounters(self.k[late], self.hits[:, late], self.trials[:, late])


@dataclass(frozen=True, kw_only=True)
class PracticeSummary:
    """Fits to runs of several seeds: each run by itself, all together, and pattern by pattern.

    Attributes:
        by_run: laws fitted to every run's average over its patterns, best first.
        exponents: exponents of the power law, run by run, by method: "likelihood", "least squares" and "line through
            the logs".
        together: laws fitted to the average over all runs, best first; for the shape of the curve, not for its errors.
        by_pattern: share of single patterns for which a law is the best.
        k: encounters of the average over all runs.
        mean: average share of reads at these encounters.
    """

    by_run: Sequence[Mapping[str, PracticeFit]]
    exponents: Mapping[str, Sequence[float]]
    together: Mapping[str, PracticeFit]
    by_pattern: Mapping[str, float]
    k: np.ndarray
    mean: np.ndarray

    @property
    def best_by_run(self) -> dict[str, float]:
        """Share of runs for which a law is the best."""
        return _shares([next(iter(fits)) for fits in self.by_run])


def summarise(runs: Sequence[Encounters], *, n_patterns: int = 40, seed: int = 0) -> PracticeSummary:
    """Exponents and model selection run by run, on the average over runs, and on single patterns.

    The uncertainty of a figure is measured by the differences between runs. The likelihood of their sum would count the
    trials of one run, which share their weights, as independent experiments.

    Args:
        runs: one for each seed.
        n_patterns: number of single patterns that are fitted, drawn over all runs.
        seed: seed of the draws.

    Raises:
        ValueError: without runs.

    Source: the warning is Heathcote, Brown and Mewhort (2000): averages over steps at different places are power-like.
    """
    if not runs:
        raise ValueError("there is no run with a practice log; train one with recurring patterns")
    averages = [run.pooled() for run in runs]
    by_run = [compare(k, errors) for k, errors in averages]
    shares = [(k, errors.hits / errors.trials) for k, errors in averages]
    rng = np.random.default_rng(seed)
    single = []
    for _ in range(n_patterns):
        run = runs[int(rng.integers(len(runs)))]
        k, errors = run.pooled([int(rng.integers(len(run.hits)))])
        if len(k) >= 4:
            single.append(next(iter(compare(k, errors))))
    k, errors = _together(averages)
    return PracticeSummary(
        by_run=by_run,
        exponents={
            "likelihood": [fits["power"].parameters["exponent"] for fits in by_run],
            "least squares": [least_squares_exponent(*one) for one in shares],
            "line through the logs": [line_exponent(*one) for one in shares],
        },
        together=compare(k, errors),
        by_pattern=_shares(single),
        k=k,
        mean=errors.hits / errors.trials,
    )


def _together(averages: Sequence[tuple[np.ndarray, Binomial]]) -> tuple[np.ndarray, Binomial]:
    """Sums over runs."""
    sums: dict[float, np.ndarray] = {}
    for k, one in averages:
        for place, hits, trials in zip(k.tolist(), one.hits, one.trials, strict=True):
            sums[place] = sums.get(place, np.zeros(2)) + np.array([hits, trials])
    k = np.array(sorted(sums))
    hits, trials = np.array([sums[place] for place in k]).T
    return k, Binomial(hits, trials)


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {law: names.count(law) / len(names) for law in LAWS if law in names} if names else {}


def threshold_gate(
    k: np.ndarray, *, rate_spread: float, n_patterns: int, threshold: float = 0.1, rate: float = 0.02, seed: int = 0
) -> Encounters:
    """The null: any distillation whose error falls exponentially, and a gate that reads while the error is too large.

    Each pattern is read at every encounter until `exp(-rate_p k)` falls below the threshold, and never again: a step.
    Rates differ between patterns by a log-normal factor, so the average over patterns is smooth.

    Args:
        k: encounters, (N,).
        rate_spread: standard deviation of the log rate over patterns.
        n_patterns: patterns.
        threshold: error below which the gate no longer reads, 0 to 1.
        rate: median learning rate, a share of the error an encounter.
        seed: of the rates.

    Source: ours.
    """
    rates = rate * np.exp(rate_spread * np.random.default_rng(seed).standard_normal(n_patterns))
    hits = (np.exp(-rates[:, None] * k) > threshold).astype(float)
    return Encounters(np.asarray(k, dtype=float), hits, np.ones_like(hits))
