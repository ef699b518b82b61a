"""Data sets that the user brings: PhysioNet 2012, MIMIC-III and UCI person activity, in the format of their makers."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cramlab.config import nearest
from cramlab.tasks.irregular.series import DataError, IrregularData, Series
from cramlab.tasks.irregular.text_tables import Row, headless_rows, rows_of, shown
from cramlab.tasks.irregular.visits import Visits, counted

HOURS = 48.0  # that are looked at, of PhysioNet 2012 and MIMIC-III
# What a static of PhysioNet 2012 can be, besides -1 for unknown.
PHYSIONET_STATICS = {"Age": (0.0, 150.0), "Gender": (0.0, 1.0), "Height": (0.0, 1000.0), "ICUType": (1.0, 4.0)}
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
ACTIVITY_TAGS = ("010-000-024-033", "010-000-030-096", "020-000-033-111", "020-000-032-221")  # ankles, chest, belt
ACTIVITIES = (
    "walking", "falling", "lying down", "lying", "sitting down", "sitting", "standing up from lying", "on all fours",
    "sitting on the ground", "standing up from sitting", "standing up from sitting on the ground",
)  # fmt: skip
ACTIVITY_VISITS = 50  # of a piece; a recording of minutes is cut into pieces
ACTIVITY_COLUMNS = ("sequence", "tag", "timestamp", "date", "x", "y", "z", "activity")
_REPLACED = "values replaced by a later row of the same person, time and channel"


def _folder(path: Path | None, name: str, holds: str) -> Path:
    if path is None or not path.is_dir():
        raise DataError(f"{name} needs --path DIR, a folder with {holds}; found {path}")
    return path


def physionet2012(path: Path | None) -> IrregularData:
    """PhysioNet/Computing in Cardiology Challenge 2012: death in hospital from the first 48 hours.

    A negative value measures nothing (the makers write -1 for unknown); of several values at one time the last stands.
    Who died within the 48 hours, by the column Survival where there is one, is left out.

    Args:
        path: folder with `Outcomes-*.txt` and, in it or below it, one `RecordID.txt` a stay.

    Raises:
        DataError: when files are missing, not of the format, or contradict one another.
    """
    folder = _folder(path, "physionet2012", "Outcomes-a.txt and set-a/")
    outcome_files = sorted(folder.glob("Outcomes-*.txt"))
    if not outcome_files:
        raise DataError(f"{folder} holds no Outcomes-*.txt; expected columns RecordID, In-hospital_death")
    outcomes = _physionet_outcomes(outcome_files)
    stays: dict[str, Path] = {}
    n_others = 0
    for file in sorted(folder.rglob("*.txt")):
        if file.stem not in outcomes:
            n_others += file.stem.isdigit()
        elif file.stem in stays:
            raise DataError(f"{file} and {stays[file.stem]} are both of stay {file.stem}; keep one")
        else:
            stays[file.stem] = file
    names = ", ".join(file.name for file in outcome_files)
    if not outcomes:
        raise DataError(f"{folder}: {names} name no stay; expected a row of RecordID and In-hospital_death for each")
    if missing := sorted(outcomes.keys() - stays.keys()):
        raise DataError(
            f"{folder} lacks the files of {len(missing)} of the {len(outcomes)} stays in {names}, "
            f"such as {missing[0]}.txt"
        )
    asked = [record for record in sorted(stays) if not outcomes[record].early]
    if not asked:
        raise DataError(f"{folder}: everybody in {names} died within the {HOURS:.0f} hours that are looked at")
    read = [_physionet_stay(stays[record], record) for record in asked]
    series = tuple(
        stay.visits.series(record, PHYSIONET_CHANNELS, stay.statics, outcomes[record].died)
        for record, stay in zip(asked, read, strict=True)
    )
    return IrregularData(
        name="physionet2012", what="death in hospital, from the first 48 hours", channels=PHYSIONET_CHANNELS,
        statics=tuple(PHYSIONET_STATICS), n_classes=2, time_unit=1.0, series=series,
        origin=f"PhysioNet 2012, {len(series)} stays of {names}",
        notes=counted(
            (len(stays) - len(asked), f"stays left out: died within the {HOURS:.0f} hours that are looked at"),
            (sum(outcomes[record].died and not outcomes[record].dated for record in asked),
             "deaths of which no Survival is known, so that they may have been within those hours"),
            (n_others, "files left out: no outcome is known"),
            (sum(stay.visits.replaced for stay in read), _REPLACED),
            (sum(stay.n_negative for stay in read), "negative values other than -1 taken as not measured"),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _Outcome:
    """How a stay ended.

    Attributes:
        row: that says so.
        died: whether in death.
        survival: days until the death, -1 for none; NaN: not said.
    """

    row: Row
    died: int
    survival: float

    @property
    def early(self) -> bool:
        """Whether the death was within the hours that are looked at."""
        return bool(self.died) and self.survival * 24 < HOURS

    @property
    def dated(self) -> bool:
        """Whether the day of the death is known."""
        return not np.isnan(self.survival)


def _physionet_outcomes(files: list[Path]) -> dict[str, _Outcome]:
    found: dict[str, _Outcome] = {}
    for file in files:
        for row in rows_of(file, ("RecordID", "In-hospital_death"), ("Length_of_stay", "Survival")):
            record, died = str(row.whole("RecordID")), row.flag("In-hospital_death")
            held = found.get(record)
            if held is not None and held.died != died:
                raise row.error(
                    f"RecordID {record} has In-hospital_death {died}, but {held.died} in {held.row.path}, "
                    f"line {held.row.line}; keep the right one"
                )
            survival, stay = (_days(row, name) for name in ("Survival", "Length_of_stay"))
            if died and survival == -1:
                raise row.wrong("Survival", "the day of death, as In-hospital_death is 1")
            if died and 0 <= stay < survival:
                raise row.wrong("Survival", f"at most Length_of_stay, {stay:g}, as In-hospital_death is 1")
            if not died and 0 <= survival < stay:
                raise row.wrong("Survival", f"at least Length_of_stay, {stay:g}, as In-hospital_death is 0")
            found[record] = _Outcome(row, died, survival)
    return found


def _days(row: Row, column: str) -> float:
    """Days, or -1 for none; NaN where nothing is said."""
    days = row.number(column) if column in row.fields else np.nan
    if days < 0 and days != -1:
        raise row.wrong(column, "days from 0, or -1")
    return days


@dataclass
class _Stay:
    """What a file of PhysioNet 2012 says."""

    statics: list[float] = field(default_factory=lambda: [np.nan] * len(PHYSIONET_STATICS))
    visits: Visits = field(default_factory=Visits)
    n_negative: int = 0


def _physionet_stay(file: Path, record: str) -> _Stay:
    stay, statics = _Stay(), list(PHYSIONET_STATICS)
    for row in rows_of(file, ("Time", "Parameter", "Value")):
        name, hours, value = row.fields["Parameter"], _hours(row), row.number("Value")
        if name in statics:
            place = statics.index(name)
            value = _static(row, name, hours, value, stay.statics[place])
            stay.statics[place] = stay.statics[place] if np.isnan(value) else value
        elif name in PHYSIONET_CHANNELS:
            stay.n_negative += value < 0 and value != -1
            stay.visits.add(hours, name, np.nan if value < 0 else value)
        elif name == "RecordID":
            if value != int(record):
                raise row.wrong("Value", f"RecordID {record}, as the file is called")
        elif name:  # some files have rows without a name, which measure nothing
            known = (*statics, *PHYSIONET_CHANNELS, "RecordID")
            raise row.error(f'column Parameter holds "{shown(name)}", which is unknown{nearest(name, known)}')
    return stay


def _static(row: Row, name: str, hours: float, value: float, held: float) -> float:
    """A fact known from the beginning; NaN for unknown. There is one of it."""
    low, high = PHYSIONET_STATICS[name]
    if value == -1 or np.isnan(value):
        return np.nan
    if not low <= value <= high:
        raise row.wrong("Value", f"{name} from {low:g} to {high:g}, or -1 for unknown")
    if hours != 0:
        raise row.wrong("Time", f"00:00, when {name} is told")
    if not np.isnan(held) and held != value:
        raise row.wrong("Value", f"{name} {held:g} as before; keep the right one")
    return value


def _hours(row: Row) -> float:
    """Since the beginning of the stay, of HH:MM."""
    found = re.fullmatch(r"(\d{1,2}):([0-5]\d)", row.fields["Time"], re.ASCII)
    hours = int(found[1]) + int(found[2]) / 60 if found else np.inf
    if hours > HOURS:
        raise row.wrong("Time", f"HH:MM from 00:00 to {HOURS:.0f}:00")
    return hours


@dataclass(frozen=True)
class _Admission:
    """A stay of MIMIC-III.

    Attributes:
        line: of the table.
        person: the patient.
        begin: when it began.
        end: of a patient who died there the death, else the discharge; None: not said.
        died: whether it ended in death.
    """

    line: int
    person: int
    begin: datetime.datetime
    end: datetime.datetime | None
    died: int

    def hours(self, moment: datetime.datetime) -> float:
        """Since the beginning."""
        return (moment - self.begin).total_seconds() / 3600


def mimic3(path: Path | None) -> IrregularData:
    """MIMIC-III: death in hospital from the laboratory values of the first 48 hours; split by patient.

    Values before admission or after 48 hours are not looked at, a row without a value measures nothing, and of several
    values at one time the last stands. A stay that ended within the 48 hours, by death or discharge, is left out: its
    outcome is no longer a question. So is one of which no row of those hours tells.

    Args:
        path: folder with `ADMISSIONS.csv` and `LABEVENTS.csv` as distributed. DISCHTIME and DEATHTIME may be missing;
            then nobody can be left out for them, and `notes` says so.

    Raises:
        DataError: when files are missing, not of the format, or contradict one another.
    """
    folder = _folder(path, "mimic3", "ADMISSIONS.csv and LABEVENTS.csv")
    admissions, labs = folder / "ADMISSIONS.csv", folder / "LABEVENTS.csv"
    stays = _admissions(admissions)
    asked = {hadm: stay for hadm, stay in stays.items() if stay.end is None or stay.hours(stay.end) > HOURS}
    visits: dict[int, Visits] = {}
    n_strangers = 0
    for row in rows_of(labs, ("HADM_ID", "ITEMID", "CHARTTIME", "VALUENUM"), ("SUBJECT_ID",)):
        hadm = row.whole("HADM_ID") if row.fields["HADM_ID"] else -1
        item = row.whole("ITEMID")
        n_strangers += hadm >= 0 and hadm not in stays
        if hadm not in asked or item not in MIMIC_ITEMS:
            continue
        stay = asked[hadm]
        if row.fields.get("SUBJECT_ID", str(stay.person)) != str(stay.person):
            raise row.wrong("SUBJECT_ID", f"{stay.person}, as in {admissions}, line {stay.line}")
        hours = stay.hours(row.moment("CHARTTIME"))
        if 0 <= hours <= HOURS:
            visits.setdefault(hadm, Visits()).add(hours, str(item), row.number("VALUENUM"))
    if not visits:
        raise DataError(
            f"{labs} holds no value of {admissions}'s stays in their first {HOURS:.0f} hours "
            f"({len(stays)} stays, {len(stays) - len(asked)} of which ended within them)"
        )
    names = tuple(str(item) for item in MIMIC_ITEMS)
    series = tuple(visits[hadm].series(str(asked[hadm].person), names, [], asked[hadm].died) for hadm in sorted(visits))
    early = [stay for hadm, stay in stays.items() if hadm not in asked]
    return IrregularData(
        name="mimic3", what="death in hospital, from the laboratory values of the first 48 hours", channels=names,
        statics=(), n_classes=2, time_unit=1.0, series=series, origin=f"MIMIC-III, {len(series)} stays",
        notes=counted(
            (sum(stay.died for stay in early), f"stays left out: died within the {HOURS:.0f} hours that are looked at"),
            (sum(not stay.died for stay in early), f"stays left out: discharged within the {HOURS:.0f} hours"),
            (sum(stay.end is None for stay in asked.values()),
             "stays of which no DISCHTIME or DEATHTIME is known, so that they may have ended within those hours"),
            (len(asked) - len(visits), "stays left out: no laboratory row of those hours"),
            (n_strangers, f"laboratory rows left out: HADM_ID is not in {admissions.name}"),
            (sum(one.replaced for one in visits.values()), _REPLACED),
        ),
    )  # fmt: skip


def _admissions(path: Path) -> dict[int, _Admission]:
    """The stays by HADM_ID.

    Raises:
        DataError: naming the first row that contradicts itself or another one, and the lines of all such rows.
    """
    found: dict[int, _Admission] = {}
    contradictions: list[tuple[Row, str]] = []
    columns = ("SUBJECT_ID", "HADM_ID", "ADMITTIME", "HOSPITAL_EXPIRE_FLAG")
    for row in rows_of(path, columns, ("DISCHTIME", "DEATHTIME")):
        hadm, died, begin = row.whole("HADM_ID"), row.flag("HOSPITAL_EXPIRE_FLAG"), row.moment("ADMITTIME")
        ends = {name: row.moment(name) for name in ("DEATHTIME", "DISCHTIME") if row.fields.get(name)}
        end = ends.get("DEATHTIME", ends.get("DISCHTIME"))
        stay = _Admission(row.line, row.whole("SUBJECT_ID"), begin, end, died)
        for name, moment in ends.items():
            if moment < begin:
                contradictions.append((row, f"{name} {moment} is before ADMITTIME {begin}"))
        if "DEATHTIME" in ends and not died:
            contradictions.append((row, "DEATHTIME is given, but HOSPITAL_EXPIRE_FLAG is 0"))
        if died and end is None and "DEATHTIME" in row.fields:
            contradictions.append((row, "HOSPITAL_EXPIRE_FLAG is 1, but DEATHTIME is empty, and no DISCHTIME is given"))
        held = found.setdefault(hadm, stay)
        if (held.person, held.begin, held.end, held.died) != (stay.person, begin, end, died):
            contradictions.append((row, f"HADM_ID {hadm} says something else on line {held.line}"))
    if contradictions:
        row, what = contradictions[0]
        lines = sorted({row.line for row, _ in contradictions})
        others = f"; so do lines {', '.join(map(str, lines[1:]))}" if lines[1:] else ""
        raise row.error(f"the row contradicts itself or another: {what}; mend it or take it out{others}")
    return found


def person_activity(path: Path | None) -> IrregularData:
    """UCI Localization Data for Person Activity: what a person is doing, at every reading; split by person.

    Readings are put in order of time; of several of one tag at one time the last one with a value stands.

    Args:
        path: `ConfLongDemo_JSI.txt`: sequence, tag, timestamp (100 ns), date, x, y, z, activity; no header.

    Raises:
        DataError: when the file is missing, not of the format, or contradicts itself.
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
            raise row.wrong("activity", f'"{other}", as at the same time on line {line}; keep the right one')
        reading = _Reading([row.number(axis) for axis in "xyz"], ACTIVITIES.index(activity))
        held = recordings.setdefault(name, {}).setdefault((stamp, ACTIVITY_TAGS.index(tag)), reading)
        replaced += held.update(reading.place)
    if not recordings:
        raise DataError(f"{path} is empty; expected lines of {', '.join(ACTIVITY_COLUMNS)}")
    series = tuple(piece for name in sorted(recordings) for piece in _pieces(name, recordings[name], len(channels)))
    return IrregularData(
        name="person-activity", what="activity at every reading", channels=channels, statics=(),
        n_classes=len(ACTIVITIES), time_unit=1.0, series=series, origin=f"UCI person activity, {len(series)} pieces",
        notes=counted((replaced, _REPLACED)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Reading:
    """Where a tag was, and what its wearer did."""

    place: list[float]
    activity: int

    def update(self, place: list[float]) -> int:
        """Takes the known values of another row of the same time and tag; returns how many it replaced."""
        replaced = 0
        for axis, value in enumerate(place):
            if not np.isnan(value):
                replaced += not np.isnan(self.place[axis]) and self.place[axis] != value
                self.place[axis] = value
        return replaced


def _pieces(name: str, readings: dict[tuple[int, int], _Reading], n_channels: int) -> Iterator[Series]:
    """A recording in pieces, in order of time; its first letter is the person."""
    ordered = sorted(readings.items(), key=lambda item: item[0][0])
    for start in range(0, len(ordered), ACTIVITY_VISITS):
        piece = ordered[start : start + ACTIVITY_VISITS]
        values = np.full((len(piece), n_channels), np.nan)
        for row, ((_, tag), reading) in zip(values, piece, strict=True):
            row[3 * tag : 3 * tag + 3] = reading.place
        times = np.array([stamp / 1e7 for (stamp, _), _ in piece])
        yield Series(name[:1], times, values, np.empty(0), np.array([reading.activity for _, reading in piece]))
