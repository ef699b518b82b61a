"""Goals of tasks beyond SRCD: `python -m reproduction.tasks_goals`. A goal without a record has no figure."""

from __future__ import annotations

from pathlib import Path

from reproduction import goals
from reproduction.goals import Goal

TOPIC = "tasks"
_MQAR = "cramlab run cramlab.tasks.mqar:MQARConfig --size small --out runs/mqar"
_NO_RECORD = "the task is there; no run has a record yet"
_OPEN = (
    ("MQAR, 64 tokens, 4 pairs, vocabulary 8,192: reads / optimum", "at most 1.05 at full attention's accuracy", _MQAR,
     _NO_RECORD),
    ("MQAR with forgetting and rebinding: reads / optimum", "at most 1.05",
     "cramlab run cramlab.tasks.rebinding:RebindingConfig --size small --out runs/rebinding", _NO_RECORD),
    ("selective copying, induction, compositional recall: reads / optimum", "at most 1.05",
     "cramlab run cramlab.tasks.induction:InductionConfig --size small --out runs/induction", _NO_RECORD),
    ("needle, phonebook, variable tracking at 1,024 to 16,384 tokens", "full attention's accuracy", "",
     "the tasks do not exist yet"),
    ("nafld2: AUC", "0.884, gradient boosting's", "", "not measured again"),
    ("irregular series from a CSV or Parquet file", "cramlab irregular --data file.csv", "", "not built yet"),
)  # fmt: skip


def found() -> list[Goal]:
    """Every goal; none has a record so far."""
    return [
        Goal(goal=goal, target=target, reached=None, interval=None, met=False, command=command, record=[], note=note)
        for goal, target, command, note in _OPEN
    ]


def renew() -> Path:
    """Writes the document of the goals."""
    return goals.write(TOPIC, found())


if __name__ == "__main__":
    renew()
