"""Goals of drift answered from the records: `python -m reproduction.drift_goals`.

It writes results/goals/drift.json. A goal without a record has no figure, and a note that says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cramlab import records
from cramlab.report.intervals import seed_interval
from reproduction.analysis.drift_cram import Outcome, by_setting, values
from reproduction.goals import FOLDER, Goal, unanswered, write

TOPIC = "drift"
ROOT = FOLDER.parents[1]
SEQUENTIAL = ROOT / "results" / "drift" / "sequential.json"
TEXT = ROOT / "results" / "drift" / "glassllm.json"
KNOWN = ROOT / "results" / "drift" / "known_size.json"
LARGER = ROOT / "results" / "drift" / "cost-smollm2.json"
SIMULATE = "python -m reproduction.protocols.sequential_test results/drift/sequential.json"
TEST = "betting"
TRAIN = "cramlab run srcd/cram --size quick --set training.max_steps=1200 --out runs/drift --seed SEED"
SERVE = "python -m reproduction.protocols.drift_cram runs/drift/cram-seed* --out results/drift"
COST = (
    "python -m reproduction.protocols.drift_cost smollm2 runs/smollm2 --text stdlib --out "
    "results/drift/cost-smollm2.json"
)
TURN = (
    "cramlab consolidate smollm2 --text stdlib --max-loss-increase 0.05 --out runs/smollm2 && "
    "python -m reproduction.protocols.drift_text smollm2 runs/smollm2 --text stdlib --turn prose --documents 60 --out "
    "results/drift/smollm2.json"
)


def rows() -> list[dict[str, Any]]:
    """Rows of the simulation."""
    return records.read_json(SEQUENTIAL)["rows"]


def row(**fields: Any) -> dict[str, Any]:
    """The row of the simulation with these fields."""
    return next(r for r in rows() if all(r.get(name) == value for name, value in fields.items()))


def _simulated(goal: str, target: str, reached: float, met: bool, interval: list[float] | None = None) -> Goal:
    record = [SEQUENTIAL.relative_to(ROOT).as_posix()]
    return Goal(goal=goal, target=target, reached=reached, interval=interval, met=met, command=SIMULATE, record=record)


def _cost() -> list[Goal]:
    """What watching costs while decoding, in time and reads."""
    goals = []
    command = (
        "python -m reproduction.protocols.drift_text glassllm runs/glass --text stdlib --turn prose --out "
        "results/drift/glassllm.json"
    )
    for size, path, made_by in (("0.85 M", TEXT, command), ("135 M", LARGER, COST)):
        goal, target = f"cost of watching while decoding, a model of {size} parameters: share of", "at most 0.005"
        if not path.is_file():
            goals.append(unanswered(f"{goal} time", target, made_by, "not measured"))
            continue
        record = records.read_json(path)
        shares = {"time": record["cost"]["share"], "reads": record["setting"]["audit_frac"]}
        goals += [
            Goal(goal=f"{goal} {what}", target=target, reached=round(share, 5), interval=None, met=share <= 0.005,
                 command=made_by, record=[path.relative_to(ROOT).as_posix()])
            for what, share in shares.items()
        ]  # fmt: skip
    return goals


def cram_records() -> list[dict[str, Any]]:
    """The record of each seed of CRAM on SRCD with change, in the order of the seeds."""
    found = [records.read_json(path) for path in (ROOT / "results" / "drift").glob("cram-seed*.json")]
    return sorted(found, key=lambda record: record["streams"][0]["seed"])


def _cram() -> list[Goal]:
    """Accuracy, forgetting and attention after an abrupt change of SRCD: the worst mean of all rho."""
    record = cram_records()
    found = {rho: of for (rho, change, arm), of in by_setting(record).items() if (change, arm) == ("abrupt", "learn")}
    kinds: list[tuple[str, str, float, Callable[[Outcome], float | None]]] = [
        ("reads per rebound pattern until 0.99 of its queries are answered right", "at most 200", 200,
         lambda one: math.inf if one.reads is None else one.reads),
        ("accuracy lost on unchanged patterns", "at most 0.001", 0.001, lambda one: one.lost),
        ("attention at the end divided by the optimum", "at most 1.05", 1.05, lambda one: one.attention),
    ]  # fmt: skip
    goals = []
    for goal, target, most, of in kinds:
        figures = {rho: values(rows, of) for rho, rows in found.items()}
        means = {rho: float(np.mean(known)) for rho, known in figures.items() if known}
        if not means:
            goals.append(unanswered(f"CRAM: {goal}", target, f"{TRAIN} && {SERVE}", "not measured"))
            continue
        for rho in dict.fromkeys((0.3, max(means, key=lambda rho: means[rho]))):
            reached = seed_interval(figures[rho]) if math.isfinite(means[rho]) else None
            bounds = [] if reached is None else [reached.low, reached.high]
            interval = [round(bound, 5) for bound in bounds if bound is not None]
            goals.append(Goal(
                goal=f"CRAM, quick size, {len(record)} seeds, rho = {rho:g}: {goal}", target=target,
                reached=None if reached is None else round(reached.mean, 5), interval=interval or None,
                met=means[rho] <= most, command=f"{TRAIN} && {SERVE}",
                record=[f"results/drift/cram-seed{one['streams'][0]['seed']}.json" for one in record],
            ))  # fmt: skip
    return goals


def found() -> list[Goal]:
    """Every goal with its figure, or why there is none."""
    goals = []
    for alpha in (0.05, 0.01):
        false = row(test=TEST, what="false alarms", alpha=alpha, before=0.01)
        goals.append(_simulated(
            f"false alarms at alpha = {alpha:g}: share of {false['streams']:,} streams of 1,000,000 tokens that just "
            "keep the promise", f"at most {alpha:g}", false["share"], false["share"] <= alpha, false["interval"],
        ))  # fmt: skip
    for alpha in (0.05, 0.01):
        late = row(test=TEST, what="delay", alpha=alpha, rho=0.3)
        least = late["least_reads"]
        ratio = [round(reads / least, 3) for reads in (late["reads"], *late["reads_interval"])]
        goals.append(_simulated(f"delay at rho = 0.3, alpha = {alpha:g}, divided by the least of any test", "at most 2",
                                ratio[0], ratio[0] <= 2, ratio[1:]))  # fmt: skip
        goals.append(_simulated(f"delay at rho = 0.3, alpha = {alpha:g}, one token in 500 audited: tokens",
                                "at most 3,000", round(late["tokens"]), late["tokens"] <= 3000))  # fmt: skip
    goals += [*_cost(), *_cram()]
    goals.append(unanswered(
        "text: mean loss increase of a consolidated SmolLM2 over code, prose and code, nats per token", "at most 0.05",
        TURN, "not run: no SmolLM2 has been consolidated with a ladder of thresholds yet",
    ))  # fmt: skip
    return goals


def renew() -> Path:
    """Writes the document of the goals."""
    return write(TOPIC, found())


if __name__ == "__main__":
    print(renew().relative_to(ROOT))
