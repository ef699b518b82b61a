"""The benchmark table: every mixer on SRCD at its own best learning rate, over several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from cramlab.config import ConfigError
from cramlab.experiments.srcd import run_config
from cramlab.experiments.study import Study
from cramlab.training.run import RunConfig

LEARNING_RATES = (7e-4, 2e-3, 6e-3)
TUNING_SEED = 1000  # used by no row of the table
MAIN: tuple[str, ...] = (
    "transformer",
    "sliding-window",
    "recurrence",
    "jamba",
    "seqboat",
    "memorizer",
    "price-only",
    "cram",
)
BASELINES: tuple[str, ...] = ("price-only-taught", "transmamba", "mixture-of-depths")
ABLATIONS: tuple[str, ...] = (
    "cram-always", "cram-oracle", "cram-random", "cram-no-consolidation", "cram-no-encoding", "cram-no-working",
    "cram-low-rank", "cram-slots", "cram-gumbel", "cram-paper", "cram-fast-semantic",
)  # fmt: skip


def _each(n_seeds: int, mixers: Sequence[str]) -> dict[str, int]:
    return dict.fromkeys(mixers, n_seeds)


# Mixers and their number of seeds, by size, in the order of training.
ROWS: dict[str, dict[str, int]] = {
    "tiny": _each(2, ("transformer", "cram", "cram-oracle")),
    "small": _each(5, MAIN) | _each(3, (*BASELINES, *ABLATIONS)),
    "medium": _each(3, ("transformer", "cram")),
    "paper": {"transformer": 3, "cram": 3, "seqboat": 1, "jamba": 1, "price-only": 1},
}
# Mixers are compared on validation after this number of tokens and at the end of their training.
BUDGET_TOKENS = {"tiny": 40_000, "small": 6_000_000, "medium": 8_000_000, "paper": 12_000_000}
_TUNING_STEPS = {"tiny": 20, "small": 1200}


def srcd_table(*, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
    """Every baseline and ablation, learning rates chosen on validation, over 3 to 5 seeds."""
    if size not in ROWS:
        raise ConfigError(f'srcd_table has no runs at size "{size}"; give --size {" or ".join(ROWS)}')
    rows = ROWS[size] if mixers is None else {mixer: ROWS[size].get(mixer, 3) for mixer in mixers}
    tunable = dict.fromkeys(tuned_as(mixer) for mixer in rows)
    rates = best_rates((yield [tuning_config(mixer, size, rate) for mixer in tunable for rate in LEARNING_RATES]))
    yield [
        table_config(mixer, size, s, rates[tuned_as(mixer)])
        for mixer, n_seeds in rows.items()
        for s in (range(n_seeds) if seed is None else (seed,))
    ]


def tuned_as(mixer: str) -> str:
    """The mixer whose tuned learning rate a mixer uses: CRAM for its ablations, itself for all others."""
    return "cram" if mixer.startswith("cram") else mixer


def tuning_config(mixer: str, size: str, rate: float) -> RunConfig:
    """A short run without evaluation on the test split. Sizes above small use the learning rates tuned at small."""
    size = "tiny" if size == "tiny" else "small"
    config = run_config(mixer=mixer, size=size, seed=TUNING_SEED, experiment="srcd_table")
    training = dataclasses.replace(config.training, learning_rate=rate, max_steps=_TUNING_STEPS[size], n_test_tokens=0)
    return dataclasses.replace(config, training=training, variant=f"lr{rate:g}")


def table_config(mixer: str, size: str, seed: int, rate: float) -> RunConfig:
    """The run of a row, with more patience and a longer cool-down than in `srcd`, the same for all mixers."""
    config = run_config(mixer=mixer, size=size, seed=seed, experiment="srcd_table")
    training = dataclasses.replace(config.training, learning_rate=rate)
    if size != "tiny":
        training = dataclasses.replace(
            training, max_steps=6000, patience_evals=12, cooldown_steps=1500, n_test_tokens=262_144,
            test_seq_lens=(512, 1024, 2048) if size == "small" else (),
        )  # fmt: skip
    return dataclasses.replace(config, training=training)


def best_rates(tuned: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The best learning rate by mixer: the lowest dynamics error among those within 0.01 of the best retrieval."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in tuned:
        found.setdefault(record["mixer"], []).append(record)
    rates = {}
    for mixer, group in sorted(found.items()):
        highest = max(record["metrics"]["validation"]["retrieval_acc"] for record in group)
        as_good = [r for r in group if r["metrics"]["validation"]["retrieval_acc"] >= highest - 0.01]
        best = min(as_good, key=lambda record: record["metrics"]["validation"]["dynamics_mse"])
        rates[mixer] = best["config"]["training"]["learning_rate"]
    return rates
