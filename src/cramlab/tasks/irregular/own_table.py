"""Irregular series from a table of one's own: CSV or Parquet, one row for each visit, or for each value of a visit.

A short table::

    customer,day,amount,left
    a,0,12.5,no
    b,3,8,yes
    a,31,9.9,no
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cramlab.tasks.irregular.series import DataError, IrregularData, Series
from cramlab.tasks.irregular.text_tables import Row, rows_of, shown
from cramlab.tasks.irregular.visits import REPLACED, counted

ENDINGS = (".csv", ".parquet")
_MOST_CLASSES = 100
_OTHER_UNIT = 100.0  # times the median of all ids from which a unit is in doubt


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a table.

    Attributes:
        id: whose row it is; all rows of an id go to one split.
        time: time of the row, a number in any unit, or a date with or without a time of day, in days then.
        values: measured values; the first is forecast. An empty field was not measured.
        label: class to predict, any text. If no id has two different labels, it is predicted at the last visit of the
            id; otherwise at every visit that has one.
    """

    id: str
    time: str
    values: tuple[str, ...]
    label: str

    def __post_init__(self) -> None:
        """Raises DataError when a column has two roles or none."""
        names = (self.id, self.time, *self.values, self.label)
        if not self.values or not all(names):
            raise DataError("--id, --time, --value and --label each name a column; give them all")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"column {twice[0]} has two roles; name it in one of --id, --time, --value and --label")


@dataclass
class _Visit:
    values: np.ndarray
    label: str
    line: int


def own_table(path: Path, columns: Columns) -> IrregularData:
    """Reads a table. Rows are sorted by time; rows of the same id and time are one visit.

    Notes say how many rows were out of order, repeated or replaced, and which ids may be in another unit. One unit of
    the gaps that models see is the median gap between two visits.

    Args:
        path: file that ends in `.csv` or `.parquet`; the latter needs the extra `cramlab[parquet]`.
        columns: names of the columns.

    Raises:
        DataError: when a file or column is missing, a field cannot be read, two labels of a visit differ, or nobody has
            two visits or a second class; names file, line, column and fix.
    """
    names = (columns.id, columns.time, *columns.values, columns.label)
    visits: dict[str, dict[float, _Visit]] = {}
    newest: dict[str, float] = {}
    dated: bool | None = None
    unsorted = repeated = replaced = 0
    for row in _rows(path, names):
        if not (person := row.fields[columns.id]):
            raise row.wrong(columns.id, "an id")
        time, is_date = _time(row, columns.time)
        if dated not in (None, is_date):
            raise row.wrong(columns.time, f"{'a date' if dated else 'a number'} as in the rows before")
        dated = is_date
        unsorted += time < newest.setdefault(person, time)
        newest[person] = max(time, newest[person])
        visit = _Visit(np.array([row.number(name) for name in columns.values]), row.fields[columns.label], row.line)
        held = visits.setdefault(person, {}).get(time)
        if held is None:
            visits[person][time] = visit
            continue
        if visit.label and held.label and visit.label != held.label:
            raise row.wrong(columns.label, f'"{shown(held.label)}" as on line {held.line} at the same time')
        known, both = np.isfinite(visit.values), np.isfinite(visit.values) & np.isfinite(held.values)
        differs = int((visit.values[both] != held.values[both]).sum())
        replaced += differs
        repeated += bool(known.any()) and not differs and bool((both == known).all())
        held.values = np.where(known, visit.values, held.values)
        held.label = held.label or visit.label
    if not visits:
        raise DataError(f"{path} holds no row; give at least five ids with their visits")
    classes = _classes(path, columns.label, visits)
    at_the_end = all(len({v.label for v in of.values() if v.label}) <= 1 for of in visits.values())
    series = tuple(_series(person, of, classes, at_the_end) for person, of in sorted(visits.items()))
    gaps = np.concatenate([np.diff(one.times) for one in series])
    if not len(gaps):
        raise DataError(f"{path}: no id has visits at two times; is {columns.id} the column of ids?")
    where = "the last visit of an id" if at_the_end else "every visit with a label"
    unit = "days" if dated else "units"
    return IrregularData(
        name=path.stem, what=f"{columns.label} at {where}, one of {', '.join(classes)}", channels=columns.values,
        statics=(), n_classes=len(classes), time_unit=float(np.median(gaps)), series=series, origin=path.name,
        notes=(
            f"{columns.label} is predicted at {where}; the median gap is {np.median(gaps):g} {unit} of {columns.time}",
            *counted(
                (unsorted, "rows earlier than a row before them of the same id; they are sorted by time"),
                (repeated, "rows that repeat a row of the same id and time; they count once"),
                (replaced, REPLACED),
            ),
            *_doubts(columns, series),
        ),
    )  # fmt: skip


def _rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    if path.suffix != ".parquet":
        yield from rows_of(path, names)
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError('reading Parquet needs pyarrow; install "cramlab[parquet]" or give a CSV file') from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        held = file.schema_arrow.names
        if missing := [name for name in names if name not in held]:
            raise DataError(f"{path} lacks {', '.join(missing)}; found {', '.join(map(shown, held[:20]))}")
        line = 0
        for batch in file.iter_batches(columns=list(names)):
            for fields in batch.to_pylist():
                line += 1
                yield Row(path, line, {name: _text(value) for name, value in fields.items()})
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a Parquet file ({error}); write it again") from error


def _text(value: Any) -> str:
    """A value of a Parquet column as a CSV file would have it."""
    if value is None or value != value:
        return ""
    return str(value).strip()


def _time(row: Row, column: str) -> tuple[float, bool]:
    """The time of a row, and whether it is a date, whose time is in days since 1970."""
    text = row.fields[column]
    try:
        if "-" in text[1:] and len(text) >= len("1970-01-01"):
            moment = datetime.datetime.fromisoformat(text)
            if moment.tzinfo is None:
                return (moment - datetime.datetime(1970, 1, 1)).total_seconds() / 86400, True
    except ValueError:
        pass
    try:
        time = row.number(column)
    except DataError:
        time = np.nan
    if np.isnan(time):
        raise row.wrong(column, "a number, or a date such as 2024-05-31 or 2024-05-31 18:00:00 without a time zone")
    return time, False


def _classes(path: Path, column: str, visits: dict[str, dict[float, _Visit]]) -> list[str]:
    classes = sorted({visit.label for of in visits.values() for visit in of.values()} - {""})
    if not 2 <= len(classes) <= _MOST_CLASSES:
        raise DataError(
            f"{path}: column {column} holds {len(classes)} different labels; give one with 2 to {_MOST_CLASSES} classes"
        )
    return classes


def _series(person: str, of: dict[float, _Visit], classes: list[str], at_the_end: bool) -> Series:
    times = sorted(of)
    labels = np.array([classes.index(of[t].label) if of[t].label else -1 for t in times])
    if at_the_end:
        label = labels.max()
        labels = np.full(len(times), -1)
        labels[-1] = label
    return Series(person, np.array(times), np.stack([of[t].values for t in times]), np.empty(0), labels)


def _doubts(columns: Columns, series: Sequence[Series]) -> list[str]:
    """Sentences on ids whose typical value or gap is far from that of all others, as in another unit."""
    doubts = []
    for what, numbers in (
        *((f"values of {name}", [np.abs(one.values[:, i]) for one in series]) for i, name in enumerate(columns.values)),
        (f"gaps of {columns.time}", [np.diff(one.times) for one in series]),
    ):
        known = [part[np.isfinite(part) & (part > 0)] for part in numbers]
        of_ids = np.array([np.median(part) for part in known if len(part)])
        if not len(of_ids):
            continue
        times = of_ids / np.median(of_ids)
        n = int(((times > _OTHER_UNIT) | (times < 1 / _OTHER_UNIT)).sum())
        if n:
            doubts.append(
                f"{n:,} ids have {what} {_OTHER_UNIT:g} times above or below the others; is the unit the same?"
            )
    return doubts
