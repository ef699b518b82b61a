"""Groups the measurements of one person into visits: all values of one time form a visit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cramlab.tasks.irregular.series import Series

REPLACED = "values replaced by a later row of the same person, time and channel"


class Visits:
    """Values by time and channel. Of several values at one time, the last is kept.

    Attributes:
        replaced: number of values that a different value of the same channel and time replaced.
    """

    def __init__(self) -> None:
        self._at: dict[float, dict[str, float]] = {}
        self.replaced = 0

    def add(self, time: float, channel: str, value: float) -> None:
        """Adds one value; NaN is ignored."""
        if np.isnan(value):
            return
        held = self._at.setdefault(time, {})
        self.replaced += held.get(channel, value) != value
        held[channel] = value

    def series(self, person: str, channels: Sequence[str], statics: Sequence[float], label: int) -> Series:
        """Returns the visits in order of time, with the label at the last; without any value, one empty visit."""
        times = sorted(self._at) or [0.0]
        values = [[self._at.get(time, {}).get(name, np.nan) for name in channels] for time in times]
        labels = np.full(len(times), -1)
        labels[-1] = label
        return Series(person, np.array(times, float), np.array(values, float), np.array(statics, float), labels)


def counted(*counts: tuple[int, str]) -> tuple[str, ...]:
    """Returns a note for each count above zero, such as `3 stays left out: ...`."""
    return tuple(f"{n:,} {what}" for n, what in counts if n)
