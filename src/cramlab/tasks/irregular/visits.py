"""Events of one person, gathered to visits: what was measured at one time is one visit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cramlab.tasks.irregular.series import Series


class Visits:
    """Values by time and channel. A blank measures nothing; of several values at one time the last one stands.

    Attributes:
        replaced: how many values gave way to another one of the same channel and time.
    """

    def __init__(self) -> None:
        self._at: dict[float, dict[str, float]] = {}
        self.replaced = 0

    def add(self, time: float, channel: str, value: float) -> None:
        """Takes one value; NaN is none."""
        if np.isnan(value):
            return
        held = self._at.setdefault(time, {})
        self.replaced += held.get(channel, value) != value
        held[channel] = value

    def series(self, person: str, channels: Sequence[str], statics: Sequence[float], label: int) -> Series:
        """In order of time, the label at the last visit; a person of whom nothing was measured has one empty visit."""
        times = sorted(self._at) or [0.0]
        values = [[self._at.get(time, {}).get(name, np.nan) for name in channels] for time in times]
        labels = np.full(len(times), -1)
        labels[-1] = label
        return Series(person, np.array(times, float), np.array(values, float), np.array(statics, float), labels)


def counted(*counts: tuple[int, str]) -> tuple[str, ...]:
    """A note for each count that is not zero: `3 stays left out, ...`."""
    return tuple(f"{n:,} {what}" for n, what in counts if n)
