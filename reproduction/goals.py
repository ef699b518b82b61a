"""Goals of a topic and figures reached: one document per topic in results/goals, and its table in a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from cramlab import records
from cramlab.files import write_json
from reproduction.pages.markdown import table

FOLDER = Path(__file__).parents[1] / "results" / "goals"


class _Figure(TypedDict):
    goal: str
    target: str
    reached: float | None
    interval: Sequence[float] | None
    met: bool
    command: str
    record: Sequence[str]


class Goal(_Figure, total=False):
    """One goal.

    Attributes:
        goal: description of the goal.
        target: the figure to be reached, as text.
        reached: the figure that was reached; None: there is no record of it.
        interval: its 95% interval, (low, high); None without one.
        met: whether the goal is reached.
        command: command that makes the records.
        record: paths of the records, relative to the repository.
        note: why there is no figure or no interval.
    """

    note: str


def unanswered(goal: str, target: str, command: str, note: str) -> Goal:
    """A goal of which there is no record.

    Args:
        goal: as in `Goal`.
        target: as in `Goal`.
        command: as in `Goal`.
        note: why there is none.
    """
    return Goal(goal=goal, target=target, reached=None, interval=None, met=False, command=command, record=[], note=note)


def path_of(topic: str, folder: Path = FOLDER) -> Path:
    """The document of a topic."""
    return folder / f"{topic}.json"


def write(topic: str, goals: Sequence[Goal], folder: Path = FOLDER) -> Path:
    """Writes the goals of a topic; returns the path of the document.

    Raises:
        ValueError: a goal lacks a field or has an unknown one, or names a record that does not exist.
    """
    root = folder.parents[1]
    for goal in goals:
        if not Goal.__required_keys__ <= goal.keys() <= Goal.__required_keys__ | Goal.__optional_keys__:
            fields = ", ".join(_Figure.__annotations__)
            raise ValueError(f"goal {goal.get('goal')!r} has the fields {', '.join(goal)}; give it {fields}")
        missing = [record for record in goal["record"] if not (root / record).exists()]
        if missing:
            raise ValueError(f"goal {goal['goal']!r} names records that do not exist: {', '.join(missing)}")
    path = path_of(topic, folder)
    write_json(path, {"kind": "goals", "topic": topic, "goals": list(goals)})
    return path


def read(topic: str, folder: Path = FOLDER) -> list[Goal]:
    """The goals of a topic, in the order in which they were written."""
    return records.read_json(path_of(topic, folder))["goals"]


def render(topic: str, folder: Path = FOLDER) -> str:
    """The goals of a topic as a Markdown table; a missed one is marked in bold, and a note stands for an interval."""
    rows = []
    for goal in read(topic, folder):
        interval = goal.get("note", "") if goal["interval"] is None else "{:.4g} to {:.4g}".format(*goal["interval"])
        met = "yes" if goal["met"] else "**no**"
        reached = "-" if goal["reached"] is None else f"{goal['reached']:,}"
        rows.append((goal["goal"], goal["target"], reached, interval, met))
    return table(("goal", "target", "reached", "95% interval", "met"), rows)
