"""Goals of training on several devices answered from the records: `python -m reproduction.scale_goals`.

It writes results/goals/scale.json. A goal without a record has no figure, and a note that says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cramlab import records
from reproduction.goals import FOLDER, Goal, unanswered, write

TOPIC = "scale"
ROOT = FOLDER.parents[1]
CPU, CUDA, LONG = (
    "results/scale/devices-cpu.json",
    "results/scale/devices-cuda.json",
    "results/scale/context-8192.json",
)
LARGE = "--set d_model=1024 n_layers=24 n_heads=16"
COMMANDS = {
    CPU: f"python -m benchmarks.devices --out {CPU}",
    CUDA: f"python -m benchmarks.devices --device cuda --devices 1 2 --context 4096 --batch 8 --out {CUDA} {LARGE}",
    LONG: f"python -m benchmarks.devices --device cuda --devices 1 --context 8192 --batch 4 --out {LONG} {LARGE}",
}
_LEAST_PARAMETERS = 300e6
_OPEN = (
    ("SRCD sweep of 32 runs on two cards: runs per hour", "a figure",
     "cramlab run srcd_sweeps --size quick --out runs/sweep --engine ray --jobs 8 --set training.accelerator=cuda",
     "not run: needs two cards"),
    ("consolidation of a model of 1 B parameters: peak bytes over those stated", "at most 1",
     "none", "not built: nothing bounds the memory of the sums"),
)  # fmt: skip


def read(path: str, root: Path = ROOT) -> dict[str, Any] | None:
    """A record; None: it has not been made."""
    return records.read_json(root / path) if (root / path).exists() else None


def row(record: dict[str, Any], arm: str, devices: int) -> dict[str, Any] | None:
    """The row of an arm on a number of devices."""
    return next((r for r in record["rows"] if (r["arm"], r["devices"]) == (arm, devices)), None)


def found(root: Path = ROOT) -> list[Goal]:
    """Every goal, in the order of the page."""
    made = [_parity(root), *_computing(root), *_faster(root), _beside_llama(root)]
    return made + [unanswered(*given) for given in _OPEN]


def _parity(root: Path) -> Goal:
    record = read(CPU, root)
    worst = None if record is None else max(record["parity"]["largest_difference"].values())
    goal = "two processes on the CPU train as one: largest difference of a weight after 20 steps, in 64 bits"
    met = worst is not None and worst <= 1e-8
    return _goal(goal, "at most 1e-8", worst, met, CPU, "exact" if record else "not run")


def _computing(root: Path) -> list[Goal]:
    """What sharing a batch costs in computing time: the part of a scaling that other work on a machine cannot hide."""
    record, made = read(CPU, root) or {"configs": (), "rows": ()}, []
    for arm in record["configs"]:
        one, two = row(record, arm, 1), row(record, arm, 2)
        if one is None or two is None:
            continue
        share = two["computing_ms"]["median"] / (2 * one["computing_ms"]["median"])
        goal = f"{arm} on the CPU, {one['n_parameters']:,} weights: computing time of a token, two processes to one"
        made.append(_goal(goal, "at most 1.08 (2 / 1.85)", round(share, 3), share <= 2 / 1.85, CPU, "ratio of medians"))
    return made


def _faster(root: Path) -> list[Goal]:
    record = read(CUDA, root)
    one, two = (None if record is None else row(record, "cram-12", n) for n in (1, 2))
    goal = "CRAM of at least 300 M parameters, context 4,096, bf16: tokens a second on two cards over one"
    if one is None or two is None:
        return [_goal(goal, "at least 1.85", None, False, CUDA, "not run: needs two cards")]
    ratio = two["tokens_per_s"] / one["tokens_per_s"]
    met = ratio >= 1.85 and one["n_parameters"] >= _LEAST_PARAMETERS
    return [_goal(goal, "at least 1.85", round(ratio, 3), met, CUDA, "ratio of medians")]


def _beside_llama(root: Path) -> Goal:
    record = read(LONG, root)
    cram, llama = (None if record is None else row(record, arm, 1) for arm in ("cram-12", "llama"))
    goal = "the same model at 8,192 tokens on one card: tokens a second over those of a Llama of its size"
    if cram is None or llama is None:
        return _goal(goal, "at least 1", None, False, LONG, "not run: needs a card")
    ratio = cram["tokens_per_s"] / llama["tokens_per_s"]
    met = ratio >= 1 and cram["n_parameters"] >= _LEAST_PARAMETERS
    return _goal(goal, "at least 1", round(ratio, 3), met, LONG, "ratio of medians")


def _goal(goal: str, target: str, reached: float | None, met: bool, path: str, note: str) -> Goal:
    held = [] if reached is None else [path]
    return Goal(goal=goal, target=target, reached=reached, interval=None, met=met, command=COMMANDS[path], record=held,
                note=note)  # fmt: skip


if __name__ == "__main__":
    print(write(TOPIC, found()))
