"""Goals answered from the records: `python -m faults.goals` writes results/goals/reliability.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scipy.stats import beta

from faults.campaign import PARTS, RESULTS, ROOT
from faults.cases import Fault
from reproduction.goals import Goal, write

TOPIC = "reliability"
COMMAND = "make faults"
SPEED = "OMP_NUM_THREADS=1 python -m benchmarks.against e93c467 --out results/reliability/speed.json"
NEVER = {
    Fault.WRONG: "silent wrong results", Fault.TRACEBACK: "tracebacks", Fault.HANG: "hangs",
    Fault.ACCEPTED: "harmful inputs accepted", Fault.UNCLEAR: "refusals without one clear line",
    Fault.LEFTOVER: "files left behind", Fault.LOST: "files of the user lost",
}  # fmt: skip
SLOWER = 1.03  # times as long as before, at most


def main() -> None:
    """Answers every goal that the records allow."""
    print(write(TOPIC, goals(found())).relative_to(ROOT))


def found(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The records that are there, by part, and the measurement of speed."""
    names = [*PARTS, "speed"]
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names
            if (folder / f"{name}.json").exists()}  # fmt: skip


def goals(records: dict[str, dict[str, Any]]) -> list[Goal]:
    """Each goal with its target, what was reached, a 95% interval of the rate behind it, and whether it is met."""
    parts = {name: record for name, record in records.items() if name != "speed"}
    tried = sum(record["tried"] for record in parts.values())
    made = []
    for fault, plural in NEVER.items():
        n = sum(failure["fault"] == fault for record in parts.values() for failure in record["failures"])
        made.append(_goal(f"no {plural} in the whole campaign", f"0 of {tried:,} tries", n, rate(n, tried), n == 0,
                          [_file(name) for name in parts]))  # fmt: skip
    if "kinds" in parts:
        record = parts["kinds"]
        n = record["failed"]
        made.append(_goal("every kind of fault that was once there is gone, by the project's own tests", "0 kinds fail",
                          n, rate(n, len(record["measured"]) + n), n == 0, [_file("kinds")]))  # fmt: skip
    if "kills" in parts:
        fewest = min(row["tried"] for row in parts["kills"]["tests"])
        made.append(_goal("kills of every command that writes", "at least 100 each", fewest, None, fewest >= 100,
                          [_file("kills")]))  # fmt: skip
    if "inputs" in parts:
        n = parts["inputs"]["tried"]
        made.append(_goal("generated bad inputs", "at least 2,000", n, None, n >= 2000, [_file("inputs")]))
    if "equalities" in parts:
        record = parts["equalities"]
        made.append(_goal("equalities of padding, batch, cache, step and packing, and leaks", "0 fail, of over 1,000",
                          record["failed"], rate(record["failed"], record["tried"]),
                          record["failed"] == 0 and record["tried"] >= 1000, [_file("equalities")]))  # fmt: skip
    if "promises" in parts:
        record = parts["promises"]
        made.append(_goal("simulated promises that break more often than their level allows", "0, of over 200 settings",
                          record["failed"], rate(record["failed"], record["tried"]),
                          record["failed"] == 0 and record["tried"] >= 200, [_file("promises")]))  # fmt: skip
    if "decisions" in parts:
        made += _decisions(parts["decisions"])
    made += _speed(records["speed"]) if "speed" in records else []
    return made


def _decisions(record: dict[str, Any]) -> list[Goal]:
    """The lowest share of equal decisions among the models, with the interval of that model."""
    rows = [row for row in record["measured"] if "share" in row]
    shares = [failure["message"] for failure in record["failures"]]
    if not rows:
        return []
    worst = min(rows, key=lambda row: row["share"])
    low, high = rate(worst["decisions"] - worst["alike"], worst["decisions"])
    return [_goal("bfloat16: decisions with a cache are those without", "at least 99% of tokens, in every model",
                  round(worst["share"], 5), [1 - high, 1 - low], not shares and worst["share"] >= 0.99,
                  [_file("decisions")])]  # fmt: skip


def _speed(record: dict[str, Any]) -> list[Goal]:
    """Time now as a share of the time before, task by task."""
    made = []
    for row in record["rows"]:
        ratio, low, high = (round(value, 3) for value in row["ratio"])
        made.append(_goal(f"speed, {row['what']}: time now over time before", f"at most {SLOWER}", ratio, [low, high],
                          ratio <= SLOWER, [_file("speed")], SPEED))  # fmt: skip
    return made


def _goal(
    goal: str, target: str, reached: float, interval: list[float] | None, met: bool, record: list[str],
    command: str = COMMAND,
) -> Goal:  # fmt: skip
    return {"goal": goal, "target": target, "reached": reached, "interval": interval, "met": met, "command": command,
            "record": record}  # fmt: skip


def rate(n: int, of: int) -> list[float]:
    """95% interval of a rate, by Clopper and Pearson; of nothing tried, all is possible."""
    if not of:
        return [0.0, 1.0]
    low = float(beta.ppf(0.025, n, of - n + 1)) if n else 0.0
    high = float(beta.ppf(0.975, n + 1, of - n)) if n < of else 1.0
    return [float(f"{0.0 if math.isnan(low) else low:.4g}"), float(f"{high:.4g}")]


def _file(name: str) -> str:
    return f"results/reliability/{name}.json"


if __name__ == "__main__":
    main()
