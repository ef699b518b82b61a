"""What happened in each stream of SRCD with change, from the records of `reproduction.protocols.drift_cram`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LAST = 5  # blocks at the end of a stream that are averaged
Record = Mapping[str, Any]
Setting = tuple[float, str, str]


class Outcome(NamedTuple):
    """One stream.

    Attributes:
        before: accuracy on the patterns that are to change, before the change.
        lowest: the same in the worst block after it.
        last: the same at the end.
        reads: reads of changed patterns, divided by their number, at the end of the first block in which at least 0.99
            of their queries are answered right; None: there is none, or the change is not abrupt.
        lost: accuracy on unchanged patterns before the change minus that after it; None: all patterns change.
        attention: attention at the end, divided by the least.
        attention_before: attention before the change, divided by the least.
        peak: the largest attention of a block, divided by the least.
        open: number of groups that still read at the end.
    """

    before: float
    lowest: float
    last: float
    reads: float | None
    lost: float | None
    attention: float
    attention_before: float
    peak: float
    open: int


def outcome(stream: Record, n_before: int) -> Outcome:
    """What happened in a stream.

    Args:
        stream: a stream of the record.
        n_before: number of blocks before the change.
    """
    blocks = stream["blocks"]
    changed, unchanged = blocks["changed"], blocks["unchanged"]
    ratio = np.array(blocks["attention"]) / np.array(blocks["optimum"])
    abrupt = stream["change"] == "abrupt"
    good = [i for i in range(n_before, len(changed)) if abrupt and changed[i] is not None and changed[i] >= 0.99]
    parts = (changed[:n_before], changed[n_before:], changed[-LAST:], unchanged[:n_before], unchanged[n_before:])
    before, after, end, *known = [[acc for acc in part if acc is not None] for part in parts]
    return Outcome(
        before=float(np.mean(before)),
        lowest=min(after),
        last=float(np.mean(end)),
        reads=blocks["reads_of_changed"][good[0]] / stream["changed"] if good else None,
        lost=float(np.mean(known[0]) - np.mean(known[1])) if all(known) else None,
        attention=float(ratio[-LAST:].mean()),
        attention_before=float(ratio[:n_before].mean()),
        peak=float(ratio.max()),
        open=blocks["open"][-1],
    )


def by_setting(found: Sequence[Record]) -> dict[Setting, list[tuple[Record, Outcome]]]:
    """Streams and what happened in them, by rho, kind of change and arm.

    Args:
        found: the record of each seed.
    """
    by: dict[Setting, list[tuple[Record, Outcome]]] = {}
    for record in found:
        n_before = record["setting"]["before"] // record["setting"]["block"]
        for one in record["streams"]:
            by.setdefault((one["rho"], one["change"], one["arm"]), []).append((one, outcome(one, n_before)))
    return by


def values(rows: Sequence[tuple[Record, Outcome]], of: Callable[[Outcome], float | None]) -> list[float]:
    """A figure of each stream that has one."""
    return [value for _, one in rows if (value := of(one)) is not None]
