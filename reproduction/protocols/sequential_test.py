"""False alarms and delay of the sequential test over audited reads, by simulation, beside ADWIN and Page-Hinkley.

    python -m reproduction.protocols.sequential_test results/drift/sequential.json

Each token is audited with probability 0.002. An audited read says whether the answer without reading was wrong; at
most `promised` of them are wrong as long as the promise holds. A change at token 200,000 makes a share rho wrong. About
ten minutes on one core. Rows of ADWIN and Page-Hinkley need `river` (BSD-3-Clause, tested with 0.26.1), which is no
dependency: `pip install river` in an environment of its own, or `--no-river`.

Parameters of ADWIN and Page-Hinkley are chosen on streams that no row counts: the quickest setting whose false alarms
on streams that just keep the promise are at most alpha. The test itself has no parameter but alpha and the promise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cramlab import records
from cramlab.betting import Floats, Watch
from cramlab.files import write_json

TOKENS, CHANGE, AUDIT_FRAC, PROMISED = 1_000_000, 200_000, 0.002, 0.01
ALPHAS, RHOS, N_GROUPS = (0.05, 0.01), (0.03, 0.1, 0.3, 1.0), 100
CHOOSING, COUNTING = 1, 2  # seeds

# From outcomes (streams, reads) to the read at which each stream has its alarm; the number of reads: none.
Test = Callable[[Floats], NDArray[np.int64]]


def least_reads(alpha: float, rho: float, promised: float = PROMISED) -> float:
    """Audited reads that any test needs in expectation, false alarms having probability alpha at most; see theory.md.

    Args:
        alpha: probability of a false alarm, below 1/2.
        rho: share of wrong answers after the change, above `promised`.
        promised: share of wrong answers up to which there must be no alarm.
    """
    divergence = rho * math.log(rho / promised)
    if rho < 1:
        divergence += (1 - rho) * math.log((1 - rho) / (1 - promised))
    return max(1.0, math.log((1 - alpha) / alpha) / divergence)


def audited(n_streams: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Places of audited tokens, (streams, reads); places from `TOKENS` on are after the end of a stream."""
    most = int(TOKENS * AUDIT_FRAC + 8 * math.sqrt(TOKENS * AUDIT_FRAC))
    return generator.geometric(AUDIT_FRAC, (n_streams, most)).cumsum(axis=1) - 1


def outcomes(places: NDArray[np.int64], before: float, rho: float, generator: np.random.Generator) -> Floats:
    """Whether each audited answer was wrong: a share `before` ahead of the change, `rho` from it on."""
    rate = np.where(places < CHANGE, before, rho)
    return (generator.random(places.shape) < rate).astype(np.float64)


def by_betting(alpha: float) -> Test:
    """The test of `cramlab.betting`, all reads together."""

    def test(wrong: Floats) -> NDArray[np.int64]:
        watch = Watch(alpha, PROMISED, n_streams=len(wrong))
        first = np.full(len(wrong), wrong.shape[1])
        for i, column in enumerate(wrong.T):
            watch.update(column)
            first = np.where(watch.alarms, np.minimum(first, i), first)
        return first

    return test


def by_likelihood(alpha: float, rho: float, begin: NDArray[np.int64]) -> Test:
    """The test of who knows size and time of the change: the likelihood ratio of the reads since."""

    def test(wrong: Floats) -> NDArray[np.int64]:
        with np.errstate(divide="ignore"):
            steps = np.where(wrong == 1, np.log(rho / PROMISED), np.log((1 - rho) / (1 - PROMISED)))
        steps[np.arange(wrong.shape[1]) < begin[:, None]] = 0.0
        return first_of(steps.cumsum(axis=1) >= math.log(1 / alpha))

    return test


def by_detector(make: Callable[[], Any]) -> Test:
    """A drift detector of river."""

    def test(wrong: Floats) -> NDArray[np.int64]:
        first = np.full(len(wrong), wrong.shape[1])
        for i, stream in enumerate(wrong.tolist()):
            detector = make()
            for j, one in enumerate(stream):
                detector.update(one)
                if detector.drift_detected:
                    first[i] = j
                    break
        return first

    return test


def first_of(alarms: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Index of the first alarm of each stream, (streams,); the number of reads where there is none."""
    return np.where(alarms.any(axis=1), alarms.argmax(axis=1), alarms.shape[1])


def false_alarms(test: Test, before: float, n_streams: int, seed: int) -> dict[str, Any]:
    """Share of streams without a change that have an alarm, with its 95% interval (Wilson)."""
    generator = np.random.default_rng([seed, round(before * 1e6)])
    places = audited(n_streams, generator)
    first = test(outcomes(places, before, before, generator))
    n = int((np.take_along_axis(places, np.minimum(first, places.shape[1] - 1)[:, None], 1)[:, 0] < TOKENS).sum())
    return {"streams": n_streams, "alarms": n, "share": n / n_streams, "interval": wilson(n, n_streams)}


def wilson(n: int, total: int, z: float = 1.96) -> list[float]:
    """95% interval of a share."""
    share, scale = n / total, 1 + z * z / total
    middle, width = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return [round(max(0.0, (middle + sign * width) / scale), 5) for sign in (-1, 1)]


def delays(test: Test | None, alpha: float, before: float, rho: float, n_streams: int) -> dict[str, Any]:
    """Delay after a change, in audited reads and tokens; None in place of a test: `by_likelihood`.

    A stream in which the change remains unnoticed counts up to its end.
    """
    generator = np.random.default_rng([COUNTING, 7, round(rho * 1e6), round(before * 1e6)])
    places = audited(n_streams, generator)
    wrong = outcomes(places, before, rho, generator)
    begin = (places < CHANGE).sum(axis=1)
    first = (test or by_likelihood(alpha, rho, begin))(wrong)
    early, ends = first < begin, (places < TOKENS).sum(axis=1)
    found = ~early & (first < ends)
    reads = np.where(found, first, ends)[~early] - begin[~early] + 1
    at = np.take_along_axis(places, np.where(found, first, ends - 1)[:, None], 1)[:, 0]
    mean, error = float(reads.mean()), float(reads.std()) / math.sqrt(len(reads))
    return {
        "streams": n_streams, "before_change": int(early.sum()), "unnoticed": int((~early & ~found).sum()),
        "reads": round(mean, 3), "reads_interval": [round(mean + s * 1.96 * error, 3) for s in (-1, 1)],
        "tokens": round(float((at[~early] - CHANGE).mean()), 1),
        "least_reads": round(least_reads(alpha, rho), 3),
    }  # fmt: skip


def locally(alpha: float, rho: float, n_streams: int) -> dict[str, Any]:
    """A share rho of 100 patterns is rebound: which are named, and how late; answers of the others stay right."""
    generator = np.random.default_rng([COUNTING, 11, round(rho * 1e6)])
    places = audited(n_streams, generator)
    n_stale = max(1, round(rho * N_GROUPS))
    watch = Watch(alpha, PROMISED, N_GROUPS, n_streams)
    reads_of = np.zeros((n_streams, n_stale))  # audited reads of each stale pattern until it is named
    first, global_reads = np.zeros(n_streams), np.zeros(n_streams)
    begin = (places < CHANGE).sum(axis=1)
    for i, column in enumerate(places.T):
        groups = generator.integers(N_GROUPS, size=n_streams)
        changed, live = column >= CHANGE, column < TOKENS
        chance = np.where(changed & (groups < n_stale), 1.0, PROMISED / 10)
        unnamed = ~watch.stale[:, :n_stale] & (changed & live)[:, None]
        reads_of += unnamed & (groups[:, None] == np.arange(n_stale))
        watch.update((generator.random(n_streams) < chance).astype(np.float64), groups)
        newly = watch.alarms & (first == 0)
        first[newly], global_reads[newly] = 1, i - begin[newly] + 1
    named = watch.stale[:, :n_stale]
    return {
        "streams": n_streams, "stale_patterns": n_stale, "alarms": int(watch.alarms.sum()),
        "before_change": int((global_reads[watch.alarms] < 1).sum()),
        "reads": round(float(global_reads[watch.alarms].mean()), 3),
        "named_frac": round(float(named.mean()), 5),
        "reads_per_named_pattern": round(float(reads_of[named].mean()), 3),
        "wrongly_named": int(watch.stale[:, n_stale:].any(axis=1).sum()),
    }  # fmt: skip


def chosen_detectors(n_streams: int) -> Iterator[tuple[str, float, str, Test]]:
    """Detectors of river: name, alpha, parameters, test; the defaults, and the quickest with few false alarms."""
    from river import drift  # type: ignore[reportMissingImports]

    kinds: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "ADWIN": [(f"delta={d:g}, clock=1", lambda d=d: drift.ADWIN(delta=d, clock=1))
                  for d in (0.5, 0.2, 0.05, 2e-2, 2e-3, 2e-4, 2e-5, 2e-6)],
        "Page-Hinkley": [(f"threshold={t:g}, delta=0.005, min_instances=1, mode=up",
                          lambda t=t: drift.PageHinkley(min_instances=1, threshold=t, mode="up"))
                         for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)],
    }  # fmt: skip
    defaults = {"ADWIN": drift.ADWIN, "Page-Hinkley": drift.PageHinkley}
    for kind, settings in kinds.items():
        for alpha in ALPHAS:
            yield kind, alpha, "defaults of river", by_detector(defaults[kind])
            passed = (
                (said, make) for said, make in settings
                if false_alarms(by_detector(make), PROMISED, n_streams, CHOOSING)["share"] <= alpha
            )  # fmt: skip
            if (found := next(passed, None)) is not None:
                yield kind, alpha, found[0], by_detector(found[1])


def rows(n_streams: int, *, river: bool) -> Iterator[dict[str, Any]]:
    """All rows of the record."""
    tests: list[tuple[str, float, str, Test | None]] = [("betting", alpha, "", by_betting(alpha)) for alpha in ALPHAS]
    tests += [("likelihood ratio, time and size known", alpha, "", None) for alpha in ALPHAS]
    if river:
        tests += chosen_detectors(n_streams // 4)
    for kind, alpha, said, test in tests:
        row = {"test": kind, "alpha": alpha, "parameters": said}
        n = n_streams if kind != "ADWIN" else n_streams // 4
        if test is not None:
            for before in (PROMISED, PROMISED / 10):
                yield row | {"what": "false alarms", "before": before} | false_alarms(test, before, n, COUNTING)
        for rho in RHOS:
            yield (
                row
                | {"what": "delay", "before": PROMISED / 10, "rho": rho}
                | delays(test, alpha, PROMISED / 10, rho, n)
            )
    for alpha in ALPHAS:
        for rho in (0.01, *RHOS):
            yield {"test": "betting, 100 groups", "alpha": alpha, "what": "local", "rho": rho} | locally(
                alpha, rho, n_streams // 4
            )


def main(given: Sequence[str] | None = None) -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of the record")
    parser.add_argument("--streams", type=int, default=1000, metavar="N", help="streams a row (default: 1000)")
    parser.add_argument("--no-river", action="store_true", help="leave out ADWIN and Page-Hinkley")
    args = parser.parse_args(given)
    found = []
    for row in rows(args.streams, river=not args.no_river):
        print(row, flush=True)
        found.append(row)
    header = records.header(torch.device("cpu"))
    versions = header["versions"] | {"river": records.package_version("river")}
    setting = {"tokens": TOKENS, "change": CHANGE, "audit_frac": AUDIT_FRAC, "promised": PROMISED}
    write_json(args.out, header | {"kind": "sequential test", "versions": versions, "setting": setting, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
