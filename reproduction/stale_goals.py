"""Goals of stale memory answered from the records: `python -m reproduction.stale_goals`.

It writes results/goals/stale.json. A goal without a record has no figure, and a note that says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cramlab import records
from reproduction.goals import FOLDER, Goal, write

TOPIC = "stale"
ROOT = FOLDER.parents[1]
SEQUENTIAL = ROOT / "results" / "stale" / "sequential.json"
TEXT = ROOT / "results" / "stale" / "glassllm.json"
SIMULATE = "python -m reproduction.protocols.sequential_test results/stale/sequential.json"
TEST = "betting"
_OPEN = (
    ("text: mean loss increase of a consolidated SmolLM2 over code, prose and code, nats per token", "at most 0.05",
     "not run: no consolidated SmolLM2 with a ladder is at hand"),
    ("CRAM: accuracy on rebound patterns within 200 reads per stale pattern", "at least 0.99",
     "not built: layers of CRAM do not reopen reads for stale patterns yet"),
    ("CRAM: accuracy lost on unchanged patterns", "at most 0.001", "not built, as above"),
    ("CRAM: attention after the change, divided by the optimum", "at most 1.05", "not built, as above"),
)  # fmt: skip


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
    """What watching costs while decoding with glassllm, in time and reads."""
    record = records.read_json(TEXT)
    command = (
        "python -m reproduction.protocols.stale_text glassllm runs/glass --text stdlib --turn prose --out "
        "results/stale/glassllm.json"
    )
    shares = {"time": record["cost"]["share"], "reads": record["setting"]["audit_frac"]}
    return [
        Goal(goal=f"cost of watching while decoding, a model of 0.85 M parameters: share of {what}",
             target="at most 0.005", reached=round(share, 5), interval=None, met=share <= 0.005, command=command,
             record=[TEXT.relative_to(ROOT).as_posix()])
        for what, share in shares.items()
    ]  # fmt: skip


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
    goals += _cost()
    return goals + [
        Goal(goal=goal, target=target, reached=None, interval=None, met=False, command="", record=[], note=note)
        for goal, target, note in _OPEN
    ]


def renew() -> Path:
    """Writes the document of the goals."""
    return write(TOPIC, found())


if __name__ == "__main__":
    print(renew().relative_to(ROOT))
