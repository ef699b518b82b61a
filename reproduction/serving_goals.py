"""Goals of serving on a GPU: `python -m reproduction.serving_goals`. A goal without a record has no figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cramlab import records
from reproduction import goals
from reproduction.goals import Goal
from reproduction.pages import renew as pages

TOPIC = "serving"
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "bench" / "serving"
PAGE = ROOT / "docs" / "serving.md"
_COMMAND = "python -m benchmarks.serving --out results/bench/serving"
_WITH_FOLDER = f"{_COMMAND} --folder runs/smollm2-p05"
_UNMEASURED = "not measured on a card yet"


def speedup(row: Mapping[str, Any]) -> float:
    """Time of the fastest original of a row, divided by that of the gated model or kernel."""
    times = {name: way["ms"]["median"] for name, way in row["ways"].items()}
    fastest = min(ms for name, ms in times.items() if name.startswith(("original", "full")))
    return fastest / times["gated"]


def of_limit(row: Mapping[str, Any]) -> float:
    """Time of the gated kernel, divided by that in which the card copies the bytes that it must load."""
    return row["ways"]["gated"]["ms"]["median"] / row["ms_limit"]


_Figure = Callable[[Mapping[str, Any]], float]
_SPEED = (  # goal, least ratio, rows that answer it, command
    ("time per output token, 1B shape, 32,768 keys, batch 1: original / ours", 1.4, "1b-32768-b1", _COMMAND),
    ("time per output token, 1B shape, 32,768 keys, batch 8: original / ours", 2.0, "1b-32768-b8", _COMMAND),
    ("time per output token, 1B shape, 65,536 keys, batch 8: original / ours", 2.3, "1b-65536-b8", _COMMAND),
    ("time per output token, 8B shape, 32,768 keys, batch 8: original / ours", 1.8, "8b-32768-b8", _COMMAND),
    ("time per output token, consolidated SmolLM2, 8,192 keys, batch 8: original / ours", 1.3, "smollm2-8192-b8",
     _WITH_FOLDER),
)  # fmt: skip
_KERNEL: tuple[tuple[str, str, _Figure, Callable[[float], bool]], ...] = (
    ("kernel alone, 1B shape, 32,768 keys, batch 8, 90% shut: full / gated", "at least 5", speedup, lambda x: x >= 5),
    ("kernel alone, 1B shape, 32,768 keys, batch 8, 90% shut: time / the bytes' limit", "at most 1.5", of_limit,
     lambda x: x <= 1.5),
)  # fmt: skip
_OPEN = (
    ("prompt of 32,768 tokens, 1B shape: original / ours", "at least 1.5",
     "not built: prompts are read by the patch that decides on the host"),
    ("memory of the card, 65,536 keys, batch 8: far keys in the host's memory / on the card", "at most 1/5",
     "not built: all keys stay on the card"),
)  # fmt: skip


def found(folder: Path = FOLDER) -> list[Goal]:
    """Every goal, answered from the records of a folder where they exist."""
    made = []
    for goal, least, row, command in _SPEED:
        rows = [f"step-{row}", f"compiled-{row}"]
        made.append(_goal(goal, f"at least {least:g}", rows, speedup, lambda x, y=least: x >= y, command, folder))
    for goal, target, figure, met in _KERNEL:
        made.append(_goal(goal, target, ["kernel-1b-32768-b8"], figure, met, _COMMAND, folder))
    return made + [goals.unanswered(goal, target, "", note) for goal, target, note in _OPEN]


def _goal(
    goal: str, target: str, rows: list[str], figure: _Figure, met: Callable[[float], bool], command: str, folder: Path
) -> Goal:
    """One goal from the last of its rows that has a record of a card: a compiled step comes behind a recorded one."""
    for row in reversed(rows):
        path = folder / f"{row}.json"
        record = records.read_json(path) if path.exists() else {}
        if "gated" in record.get("ways", {}) and record["hardware"]["accelerator"]:
            value = round(figure(record), 4)
            note = f"one run on one {record['hardware']['accelerator']}, {record.get('how', 'recorded')}"
            name = path.relative_to(folder.parents[2]).as_posix()
            return Goal(goal=goal, target=target, reached=value, interval=None, met=met(value),
                        command=f"{command} --rows {row}", record=[name], note=note)  # fmt: skip
    return goals.unanswered(goal, target, f"{command} --rows {' '.join(rows)}", _UNMEASURED)


def renew() -> Path:
    """Writes the document of the goals and their table in the page."""
    path = goals.write(TOPIC, found())
    pages.renew(PAGE, {"goals": goals.render(TOPIC)})
    return path


if __name__ == "__main__":
    renew()
