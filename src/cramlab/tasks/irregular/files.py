"""Data sets that the user brings: PhysioNet 2012, MIMIC-III and UCI person activity, in the format of their makers."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cramlab.tasks.irregular.packaged_tables import DataError
from cramlab.tasks.irregular.series import IrregularData, Series

PHYSIONET_STATICS = ("Age", "Gender", "Height", "ICUType")
PHYSIONET_CHANNELS = (
    "HR", "GCS", "SysABP", "DiasABP", "MAP", "NISysABP", "NIDiasABP", "NIMAP", "RespRate", "Temp", "SaO2", "FiO2",
    "MechVent", "PaCO2", "PaO2", "pH", "Urine", "Weight", "BUN", "Creatinine", "Glucose", "HCO3", "HCT", "K", "Lactate",
    "Mg", "Na", "Platelets", "WBC", "Albumin", "ALP", "ALT", "AST", "Bilirubin", "Cholesterol", "TroponinI",
    "TroponinT",
)  # fmt: skip
# Laboratory values of MIMIC-III by ITEMID: creatinine, potassium, sodium, urea nitrogen, bicarbonate, chloride,
# hematocrit, white cells, platelets, glucose, lactate, bilirubin, pH, albumin.
MIMIC_ITEMS = (
    50912, 50971, 50983, 51006, 50882, 50902, 51221, 51301, 51265, 50931, 50813, 50885, 50820, 50862,
)  # fmt: skip
MIMIC_HOURS = 48.0
ACTIVITY_TAGS = ("010-000-024-033", "010-000-030-096", "020-000-033-111", "020-000-032-221")  # ankles, chest, belt
ACTIVITIES = (
    "walking", "falling", "lying down", "lying", "sitting down", "sitting", "standing up from lying", "on all fours",
    "sitting on the ground", "standing up from sitting", "standing up from sitting on the ground",
)  # fmt: skip
ACTIVITY_VISITS = 50  # of a piece; a recording of minutes is cut into pieces


def rows_of(path: Path, expected: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that has (at least) the expected columns.

    Raises:
        DataError: when the file is missing, is no text, lacks a column or has a row that stops before one; it names
            path, expected columns and what was found.
    """
    columns = f"expected columns {', '.join(expected)}"
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a CSV file with columns {', '.join(expected)}")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            found = [name.strip() for name in reader.fieldnames or ()]
            if missing := [name for name in expected if name not in found]:
                raise DataError(f"{path} lacks {', '.join(missing)}; {columns}, found {', '.join(found) or 'nothing'}")
            reader.fieldnames = found
            for row in reader:
                if any(row[name] is None for name in expected):
                    held = ", ".join(value for value in row.values() if value is not None)
                    raise DataError(f'{path}, line {reader.line_num}: {columns}, found "{held}"')
                yield row
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text ({error.reason}); {columns}; unpack it if it is packed") from None


def number(text: str, path: Path, column: str) -> float:
    """A number, or NaN for an empty field.

    Raises:
        DataError: naming path, column and what was found.
    """
    if not text or not text.strip():
        return np.nan
    try:
        return float(text)
    except ValueError:
        raise DataError(f'{path}: column {column} holds "{text}", expected a number') from None


def flag(row: dict[str, str], path: Path, column: str) -> int:
    """What a column of zeros and ones holds.

    Raises:
        DataError: naming path, column and what was found.
    """
    if row[column].strip() not in ("0", "1"):
        raise DataError(f'{path}: column {column} holds "{row[column]}", expected 0 or 1')
    return int(row[column])


def _folder(path: Path | None, name: str, holds: str) -> Path:
    if path is None or not path.is_dir():
        raise DataError(f"{name} needs --path DIR, a folder with {holds}; found {path}")
    return path


def physionet2012(path: Path | None) -> IrregularData:
    """PhysioNet/Computing in Cardiology Challenge 2012: death in hospital from the first 48 hours.

    Args:
        path: folder with `Outcomes-*.txt` and, in it or below it, one `RecordID.txt` a stay.
    """
    folder = _folder(path, "physionet2012", "Outcomes-a.txt and set-a/")
    outcome_files = sorted(folder.glob("Outcomes-*.txt"))
    if not outcome_files:
        raise DataError(f"{folder} holds no Outcomes-*.txt; expected columns RecordID, In-hospital_death")
    died = {
        row["RecordID"].strip(): flag(row, file, "In-hospital_death")
        for file in outcome_files
        for row in rows_of(file, ("RecordID", "In-hospital_death"))
    }
    stays = {file.stem: file for file in folder.rglob("*.txt") if file.stem in died}
    names = ", ".join(file.name for file in outcome_files)
    if not died:
        raise DataError(f"{folder}: {names} name no stay; expected a row of RecordID and In-hospital_death for each")
    if missing := sorted(died.keys() - stays.keys()):
        raise DataError(
            f"{folder} lacks the files of {len(missing)} of the {len(died)} stays in {names}, such as {missing[0]}.txt"
        )
    series = tuple(_physionet_stay(stays[record], died[record]) for record in sorted(stays))
    return IrregularData(
        name="physionet2012", what="death in hospital, from the first 48 hours", channels=PHYSIONET_CHANNELS,
        statics=PHYSIONET_STATICS, n_classes=2, time_unit=1.0, series=series,
        origin=f"PhysioNet 2012, {len(series)} stays of {names}",
    )  # fmt: skip


def _physionet_stay(file: Path, died: int) -> Series:
    known = dict.fromkeys(PHYSIONET_STATICS, np.nan)
    events: dict[float, dict[str, float]] = {}
    for row in rows_of(file, ("Time", "Parameter", "Value")):
        name, value = row["Parameter"], number(row["Value"], file, "Value")
        value = np.nan if value < 0 else value  # -1 says unknown
        hours, colon, minutes = row["Time"].partition(":")
        if not colon or not (hours.isdigit() and minutes.isdigit()):
            raise DataError(f'{file}: column Time holds "{row["Time"]}", expected HH:MM')
        time = int(hours) + int(minutes) / 60
        if name in known and time == 0:
            known[name] = value
        elif name in PHYSIONET_CHANNELS:
            events.setdefault(time, {})[name] = value
    return _stay(file.stem, events, PHYSIONET_CHANNELS, list(known.values()), died)


def _stay(person: str, events: dict, channels: tuple, statics: list[float], label: int) -> Series:
    """Of events by time; one without any keeps a single empty visit."""
    times = sorted(events) or [0.0]
    values = np.array([[events.get(t, {}).get(name, np.nan) for name in channels] for t in times], dtype=float)
    labels = np.full(len(times), -1)
    labels[-1] = label
    return Series(person, np.array(times, dtype=float), values, np.array(statics, dtype=float), labels)


def mimic3(path: Path | None) -> IrregularData:
    """MIMIC-III: death in hospital from the laboratory values of the first 48 hours; split by patient.

    Args:
        path: folder with `ADMISSIONS.csv` and `LABEVENTS.csv` as distributed.
    """
    folder = _folder(path, "mimic3", "ADMISSIONS.csv and LABEVENTS.csv")
    admissions = folder / "ADMISSIONS.csv"
    stays: dict[str, tuple[str, datetime.datetime, int]] = {}
    for row in rows_of(admissions, ("SUBJECT_ID", "HADM_ID", "ADMITTIME", "HOSPITAL_EXPIRE_FLAG")):
        died = flag(row, admissions, "HOSPITAL_EXPIRE_FLAG")
        stays[row["HADM_ID"]] = (row["SUBJECT_ID"], _moment(row["ADMITTIME"], admissions, "ADMITTIME"), died)
    labs = folder / "LABEVENTS.csv"
    events: dict[str, dict[float, dict[str, float]]] = {}
    items = {str(item) for item in MIMIC_ITEMS}
    for row in rows_of(labs, ("HADM_ID", "ITEMID", "CHARTTIME", "VALUENUM")):
        stay = stays.get(row["HADM_ID"])
        if stay is None or row["ITEMID"] not in items:
            continue
        hours = (_moment(row["CHARTTIME"], labs, "CHARTTIME") - stay[1]).total_seconds() / 3600
        if 0 <= hours <= MIMIC_HOURS:
            value = number(row["VALUENUM"], labs, "VALUENUM")
            events.setdefault(row["HADM_ID"], {}).setdefault(hours, {})[row["ITEMID"]] = value
    if not events:
        raise DataError(f"{labs} holds no value of {admissions}'s stays in their first {MIMIC_HOURS:.0f} hours")
    names = tuple(str(item) for item in MIMIC_ITEMS)
    series = tuple(_stay(stays[hadm][0], events[hadm], names, [], stays[hadm][2]) for hadm in sorted(events))
    return IrregularData(
        name="mimic3", what="death in hospital, from the laboratory values of the first 48 hours", channels=names,
        statics=(), n_classes=2, time_unit=1.0, series=series, origin=f"MIMIC-III, {len(series)} stays",
    )  # fmt: skip


def _moment(text: str, path: Path, column: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f'{path}: column {column} holds "{text}", expected YYYY-MM-DD HH:MM:SS') from None


def person_activity(path: Path | None) -> IrregularData:
    """UCI Localization Data for Person Activity: what a person is doing, at every reading; split by person.

    Args:
        path: `ConfLongDemo_JSI.txt`: sequence, tag, timestamp (100 ns), date, x, y, z, activity; no header.
    """
    if path is None or not path.is_file():
        raise DataError(f"person-activity needs --path FILE, ConfLongDemo_JSI.txt; found {path}")
    channels = tuple(f"{axis} of {tag}" for tag in ACTIVITY_TAGS for axis in "xyz")
    recordings: dict[str, list[tuple[float, int, list[float], int]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line, fields in enumerate(csv.reader(file), start=1):
            if len(fields) != 8:
                raise DataError(
                    f"{path}, line {line}: expected 8 fields (sequence, tag, timestamp, date, x, y, z, activity), "
                    f"found {len(fields)}"
                )
            name, tag, stamp, _, *place, activity = (field.strip() for field in fields)
            if tag not in ACTIVITY_TAGS or activity not in ACTIVITIES:
                raise DataError(
                    f'{path}, line {line}: unknown tag "{tag}" or activity "{activity}"; expected one of '
                    f"{', '.join(ACTIVITY_TAGS)}, and one of {', '.join(ACTIVITIES)}"
                )
            position = [number(text, path, axis) for text, axis in zip(place, "xyz", strict=True)]
            if not stamp.isdigit():
                raise DataError(f'{path}, line {line}: column timestamp holds "{stamp}", expected a whole number')
            reading = (int(stamp) / 1e7, ACTIVITY_TAGS.index(tag), position)
            recordings.setdefault(name, []).append((*reading, ACTIVITIES.index(activity)))
    if not recordings:
        raise DataError(f"{path} is empty; expected lines of sequence, tag, timestamp, date, x, y, z, activity")
    series = tuple(piece for name in sorted(recordings) for piece in _pieces(name, recordings[name], len(channels)))
    return IrregularData(
        name="person-activity", what="activity at every reading", channels=channels, statics=(),
        n_classes=len(ACTIVITIES), time_unit=1.0, series=series, origin=f"UCI person activity, {len(series)} pieces",
    )  # fmt: skip


def _pieces(name: str, readings: list[tuple[float, int, list[float], int]], n_channels: int) -> Iterator[Series]:
    """A recording in pieces; its first letter is the person."""
    readings.sort(key=lambda reading: reading[0])
    for start in range(0, len(readings), ACTIVITY_VISITS):
        piece = readings[start : start + ACTIVITY_VISITS]
        values = np.full((len(piece), n_channels), np.nan)
        for row, (_, tag, position, _) in zip(values, piece, strict=True):
            row[3 * tag : 3 * tag + 3] = position
        times = np.array([reading[0] for reading in piece])
        yield Series(name[:1], times, values, np.empty(0), np.array([reading[3] for reading in piece]))
