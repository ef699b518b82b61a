"""Delay of a test that knows everything about a change but its time: CUSUM, with a threshold for one length of stream.

    python -m reproduction.protocols.known_size results/drift/known_size.json

CUSUM of the likelihood ratio is the quickest test of all whose mean time to a false alarm is as long (Moustakides
1986). Its threshold is chosen on streams that just keep the promise, as low as alpha allows over one million tokens;
then the delay is counted on the streams of `sequential_test`. A minute on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cramlab import records
from cramlab.betting import Floats
from cramlab.files import write_json
from reproduction.protocols.sequential_test import (
    ALPHAS,
    AUDIT_FRAC,
    CHANGE,
    CHOOSING,
    PROMISED,
    TOKENS,
    Test,
    audited,
    delays,
    first_of,
)

RHOS = (0.1, 0.3)
_NEVER = -1e9  # of a threshold: before the stream and after its end


def cusums(wrong: Floats, rho: float) -> Floats:
    """CUSUM after each read, (streams, reads), for a change from the promise to a share rho below 1."""
    steps = np.where(wrong == 1, math.log(rho / PROMISED), math.log((1 - rho) / (1 - PROMISED)))
    found, last = np.empty_like(steps), np.zeros(len(steps))
    for i, step in enumerate(steps.T):
        last = np.maximum(last, 0.0) + step
        found[:, i] = last
    return found


def threshold(alpha: float, rho: float, n_streams: int) -> tuple[float, float]:
    """The lowest threshold that a share of at most alpha of the streams that just keep the promise reaches; that share.

    Args:
        alpha: probability of a false alarm in a stream.
        rho: share of wrong answers that CUSUM looks for.
        n_streams: number of streams, of which at least one in 1 / alpha is needed.
    """
    generator = np.random.default_rng([CHOOSING, 13])
    places = audited(n_streams, generator)
    wrong = (generator.random(places.shape) < PROMISED).astype(np.float64)
    highest = np.where(places < TOKENS, cusums(wrong, rho), _NEVER).max(axis=1)
    for value in np.unique(highest.round(9)):
        share = float((highest >= value - 1e-6).mean())
        if share <= alpha:
            return float(value) - 1e-6, share
    raise ValueError(f"n_streams = {n_streams} is too few for alpha = {alpha}; give at least {math.ceil(1 / alpha)}")


def by_cusum(rho: float, at: float) -> Test:
    """CUSUM with a threshold."""
    return lambda wrong: first_of(cusums(wrong, rho) >= at)


def main(given: Sequence[str] | None = None) -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of the record")
    parser.add_argument("--streams", type=int, default=10_000, metavar="N", help="to choose on (default: 10,000)")
    args = parser.parse_args(given)
    rows = []
    for alpha in ALPHAS:
        for rho in RHOS:
            at, share = threshold(alpha, rho, args.streams)
            late = delays(by_cusum(rho, at), alpha, PROMISED / 10, rho, args.streams // 10)
            rows.append({"alpha": alpha, "rho": rho, "threshold": at, "false_alarms": share} | late)
            print(rows[-1], flush=True)
    setting = {"tokens": TOKENS, "change": CHANGE, "audit_frac": AUDIT_FRAC, "promised": PROMISED}
    header = records.header(torch.device("cpu")) | {"kind": "known size", "setting": setting}
    write_json(args.out, header | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
