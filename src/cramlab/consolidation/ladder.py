"""The ladder of a consolidation: thresholds that a guard can go down, each of which reads at least twice as much.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        skipped_frac: share of far reads that its threshold was made for; 0: the patch is closed.
        threshold: threshold of all gates.
    """

    skipped_frac: float
    threshold: float

    @property
    def is_closed(self) -> bool:
        """Whether every token reads, through the original attention."""
        return self.skipped_frac == 0

    def __str__(self) -> str:
        """What it does, as part of a sentence."""
        if self.is_closed:
            return "the closed patch (every token reads)"
        return f"{self.skipped_frac:.0%} of far reads skipped"


CLOSED = Rung(0.0, -math.inf)


def ladder_of(record: Mapping[str, Any]) -> tuple[Rung, ...]:
    """The rungs of a consolidation: the calibrated one, then each that reads twice as much as the last, then closed.

    Only the calibrated rung is certified; the others skip less. A record of an earlier version holds no other
    thresholds, so the closed patch comes next.

    Args:
        record: record of a folder.
    """
    rows = [record, *sorted(record.get("ladder", []), key=lambda row: -row["skipped_frac"])]
    rungs: list[Rung] = []
    for row in rows:
        rung = Rung(row["skipped_frac"], math.inf if row["threshold"] is None else row["threshold"])
        twice = not rungs or 1 - rung.skipped_frac >= 2 * (1 - rungs[-1].skipped_frac) - 1e-9  # rounding
        if twice and (not rungs or rung.threshold < rungs[-1].threshold):
            rungs.append(rung)
    return (*rungs, CLOSED)
