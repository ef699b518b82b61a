"""Goals of tasks beyond SRCD, shown on docs/leaderboard.md: `python -m reproduction.leaderboard` renews both.

A goal without a record has no figure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cramlab import records
from cramlab.report.intervals import seed_interval
from reproduction import goals
from reproduction.goals import Goal

TOPIC = "leaderboard"
_MQAR = "cramlab run mqar --size small --out runs/results/mqar --set training.accelerator=cuda"
_NO_RECORD = "the task is there; no run has a record yet"
_OPEN = (
    ("MQAR with forgetting and rebinding: reads / optimum", "at most 1.05",
     "cramlab run cramlab.tasks.rebinding:RebindingConfig --size small --out runs/rebinding", _NO_RECORD),
    ("selective copying, induction, compositional recall: reads / optimum", "at most 1.05",
     "cramlab run cramlab.tasks.induction:InductionConfig --size small --out runs/induction", _NO_RECORD),
    ("needle, phonebook, variable tracking at 1,024 to 16,384 tokens", "full attention's accuracy",
     "cramlab run cramlab.tasks.phonebook:PhonebookConfig --size small --out runs/phonebook",
     "phone book and variable tracking are there, needle is not; no run has a record yet"),
)  # fmt: skip

_TABLE = Goal(
    goal="irregular series from a CSV or Parquet file", target="cramlab irregular --data file.csv",
    reached=None, interval=None, met=True, record=[],
    command="cramlab irregular --data FILE --id A --time B --value C,D --label E --out DIR",
    note="a test trains on such a file",
)  # fmt: skip


def found(results: Path = goals.FOLDER.parent) -> list[Goal]:
    """Every goal, answered from the records under `results`."""
    return [_mqar(results), *(goals.unanswered(*given) for given in _OPEN), _nafld2(results), _TABLE]


def _mqar(results: Path) -> Goal:
    """Reads of CRAM over the optimum; met if it is as accurate as the same layer with every read."""
    runs = {name: _read(results / "mqar" / "small", f"{name}-seed*") for name in ("cram-delta", "cram-always")}
    goal = "MQAR, 64 tokens, 4 pairs, vocabulary 8,192: reads / optimum of `cram-delta`"
    target = "at most 1.05 at full attention's accuracy (`cram-always`)"
    if not all(runs.values()):
        return goals.unanswered(goal, target, _MQAR, _NO_RECORD)
    ratios = [r["metrics"]["test"]["reads_frac"] / r["oracle"]["attention_frac"] for r in runs["cram-delta"].values()]
    accuracy, control = (
        float(np.mean([record["metrics"]["test"]["retrieval_acc"] for record in group.values()]))
        for group in runs.values()
    )
    return Goal(
        goal=goal, target=target, command=_MQAR,
        reached=round(float(np.mean(ratios)), 3), **_over_seeds(ratios),
        met=max(ratios) <= 1.05 and accuracy >= control - 0.005,
        record=[str(path.relative_to(results.parent)) for group in runs.values() for path in group],
    )  # fmt: skip


def _nafld2(results: Path) -> Goal:
    """AUC of CRAM from scratch beside that of gradient boosting on the same splits."""
    folder = results / "irregular" / "nafld2"
    ours, trees = (_read(folder, f"{name}-seed?") for name in ("cram", "gradient-boosting"))
    auc, best = ([document["test"]["auc"] for document in group.values()] for group in (ours, trees))
    return Goal(
        goal="nafld2: AUC of CRAM, trained from scratch", target=f"{np.mean(best):.3f}, gradient boosting's",
        reached=round(float(np.mean(auc)), 3), **_over_seeds(auc), met=bool(np.mean(auc) >= np.mean(best)),
        command="cramlab irregular --data nafld2 --models cram,gradient-boosting --out runs/results/irregular",
        record=[str(path.relative_to(results.parent)) for path in (*ours, *trees)],
    )  # fmt: skip


def _read(folder: Path, pattern: str) -> dict[Path, Any]:
    return {path: records.read_json(path) for path in sorted(folder.glob(f"{pattern}.json"))}


def _over_seeds(values: list[float]) -> Any:
    """The field "interval" for values over seeds."""
    got = seed_interval(values)
    return {"interval": None if got.low is None or got.high is None else [round(got.low, 3), round(got.high, 3)]}


def renew() -> Path:
    """Writes the document of the goals."""
    return goals.write(TOPIC, found())
