"""UCI Localization Data for Person Activity, in the format of its makers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cramlab.tasks.irregular.series import DataError, IrregularData, Series
from cramlab.tasks.irregular.text_tables import headless_rows, shown
from cramlab.tasks.irregular.visits import REPLACED, counted

ACTIVITY_TAGS = ("010-000-024-033", "010-000-030-096", "020-000-033-111", "020-000-032-221")  # ankles, chest, belt
ACTIVITIES = (
    "walking", "falling", "lying down", "lying", "sitting down", "sitting", "standing up from lying", "on all fours",
    "sitting on the ground", "standing up from sitting", "standing up from sitting on the ground",
)  # fmt: skip
ACTIVITY_VISITS = 50  # visits per series; longer recordings are cut into pieces
ACTIVITY_COLUMNS = ("sequence", "tag", "timestamp", "date", "x", "y", "z", "activity")


def person_activity(path: Path | None) -> IrregularData:
    """Loads UCI person activity: predict the activity at every reading; split by person.

    Readings are sorted by time; of several values of one tag at one time, the last is kept.

    Args:
        path: file `ConfLongDemo_JSI.txt`: sequence, tag, timestamp (100 ns), date, x, y, z, activity; no header.

    Raises:
        DataError: when the file is missing, malformed or contradicts itself.
    """
    if path is None or not path.is_file():
        raise DataError(f"person-activity needs --path FILE, ConfLongDemo_JSI.txt; found {path}")
    channels = tuple(f"{axis} of {tag}" for tag in ACTIVITY_TAGS for axis in "xyz")
    recordings: dict[str, dict[tuple[int, int], _Reading]] = {}
    activities: dict[tuple[str, int], tuple[str, int]] = {}
    replaced = 0
    for row in headless_rows(path, ACTIVITY_COLUMNS):
        name, tag, activity = (row.fields[column] for column in ("sequence", "tag", "activity"))
        if tag not in ACTIVITY_TAGS or activity not in ACTIVITIES:
            raise row.error(
                f'unknown tag "{shown(tag)}" or activity "{shown(activity)}"; expected one of '
                f"{', '.join(ACTIVITY_TAGS)}, and one of {', '.join(ACTIVITIES)}"
            )
        if not re.fullmatch(r"[A-Z]\d+", name, re.ASCII):
            raise row.wrong("sequence", "the letter of a person and a number, such as A01")
        stamp = row.whole("timestamp")
        other, line = activities.setdefault((name, stamp), (activity, row.line))
        if other != activity:
            raise row.wrong("activity", f'"{other}" as on line {line} at the same time; keep the right one')
        reading = _Reading([row.number(axis) for axis in "xyz"], ACTIVITIES.index(activity))
        held = recordings.setdefault(name, {}).setdefault((stamp, ACTIVITY_TAGS.index(tag)), reading)
        replaced += held.update(reading.place)
    if not recordings:
        raise DataError(f"{path} is empty; expected lines of {', '.join(ACTIVITY_COLUMNS)}")
    series = tuple(piece for name in sorted(recordings) for piece in _pieces(name, recordings[name], len(channels)))
    return IrregularData(
        name="person-activity", what="activity at every reading", channels=channels, statics=(),
        n_classes=len(ACTIVITIES), time_unit=1.0, series=series, origin=f"UCI person activity, {len(series)} pieces",
        notes=counted((replaced, REPLACED)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Reading:
    """Position of a tag, and activity of its wearer."""

    place: list[float]
    activity: int

    def update(self, place: list[float]) -> int:
        """Takes over the known values of a later row of the same time and tag; returns how many it replaced."""
        replaced = 0
        for axis, value in enumerate(place):
            if not np.isnan(value):
                replaced += not np.isnan(self.place[axis]) and self.place[axis] != value
                self.place[axis] = value
        return replaced


def _pieces(name: str, readings: dict[tuple[int, int], _Reading], n_channels: int) -> Iterator[Series]:
    """Yields a recording in pieces, in order of time. The first letter of its name is the person."""
    ordered = sorted(readings.items(), key=lambda item: item[0][0])
    for start in range(0, len(ordered), ACTIVITY_VISITS):
        piece = ordered[start : start + ACTIVITY_VISITS]
        values = np.full((len(piece), n_channels), np.nan)
        for row, ((_, tag), reading) in zip(values, piece, strict=True):
            row[3 * tag : 3 * tag + 3] = reading.place
        times = np.array([stamp / 1e7 for (stamp, _), _ in piece])
        yield Series(name[:1], times, values, np.empty(0), np.array([reading.activity for _, reading in piece]))
