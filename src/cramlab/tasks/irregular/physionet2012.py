"""PhysioNet/Computing in Cardiology Challenge 2012, in the format of its makers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cramlab.config import nearest
from cramlab.tasks.irregular.series import DataError, IrregularData
from cramlab.tasks.irregular.text_tables import Row, needed_folder, rows_of, shown
from cramlab.tasks.irregular.visits import REPLACED, Visits, counted

HOURS = 48.0  # hours from the beginning of a stay that are used
# Range of each static; -1 means unknown.
PHYSIONET_STATICS = {"Age": (0.0, 150.0), "Gender": (0.0, 1.0), "Height": (0.0, 1000.0), "ICUType": (1.0, 4.0)}
PHYSIONET_CHANNELS = (
    "HR", "GCS", "SysABP", "DiasABP", "MAP", "NISysABP", "NIDiasABP", "NIMAP", "RespRate", "Temp", "SaO2", "FiO2",
    "MechVent", "PaCO2", "PaO2", "pH", "Urine", "Weight", "BUN", "Creatinine", "Glucose", "HCO3", "HCT", "K", "Lactate",
    "Mg", "Na", "Platelets", "WBC", "Albumin", "ALP", "ALT", "AST", "Bilirubin", "Cholesterol", "TroponinI",
    "TroponinT",
)  # fmt: skip


def physionet2012(path: Path | None) -> IrregularData:
    """Loads PhysioNet 2012: predict death in hospital from the first 48 hours.

    Negative values count as not measured (the makers write -1 for unknown); of several values at one time, the last is
    kept. Stays that ended in death within the 48 hours, by the column Survival if it exists, are left out.

    Args:
        path: folder with `Outcomes-*.txt` and, in it or below it, one file `RecordID.txt` per stay.

    Raises:
        DataError: when a file is missing or malformed, or files contradict each other.
    """
    folder = needed_folder(path, "physionet2012", "Outcomes-a.txt and set-a/")
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
            raise DataError(f"{file} and {stays[file.stem]} both hold stay {file.stem}; keep one")
        else:
            stays[file.stem] = file
    names = ", ".join(file.name for file in outcome_files)
    if not outcomes:
        raise DataError(
            f"{folder}: {names} list no stay; expected one row per stay, with RecordID and In-hospital_death"
        )
    if missing := sorted(outcomes.keys() - stays.keys()):
        raise DataError(
            f"{folder} lacks the files of {len(missing)} of the {len(outcomes)} stays in {names}, "
            f"such as {missing[0]}.txt"
        )
    asked = [record for record in sorted(stays) if not outcomes[record].early]
    if not asked:
        raise DataError(f"{folder}: every stay in {names} ended in death within the first {HOURS:.0f} hours")
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
            (len(stays) - len(asked), f"stays left out: died within the first {HOURS:.0f} hours"),
            (sum(outcomes[record].died and not outcomes[record].dated for record in asked),
             "deaths without a known Survival, which may have been within those hours"),
            (n_others, "files left out: their outcome is unknown"),
            (sum(stay.visits.replaced for stay in read), REPLACED),
            (sum(stay.n_negative for stay in read), "negative values other than -1 counted as not measured"),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _Outcome:
    """End of a stay.

    Attributes:
        row: row of the table.
        died: 1 when the stay ended in death, else 0.
        survival: days until death, -1: none; NaN: not given.
    """

    row: Row
    died: int
    survival: float

    @property
    def early(self) -> bool:
        """Whether the patient died within the hours that are used."""
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
    """Returns days, or -1 for none; NaN when the column is missing or empty."""
    days = row.number(column) if column in row.fields else np.nan
    if days < 0 and days != -1:
        raise row.wrong(column, "days from 0, or -1")
    return days


@dataclass
class _Stay:
    """Content of one stay's file; `n_negative` counts negative values other than -1."""

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
                raise row.wrong("Value", f"RecordID {record}, as in the file's name")
        elif name:  # some files have rows without a name, which hold no measurement
            known = (*statics, *PHYSIONET_CHANNELS, "RecordID")
            raise row.error(f'column Parameter holds "{shown(name)}", which is unknown{nearest(name, known)}')
    return stay


def _static(row: Row, name: str, hours: float, value: float, held: float) -> float:
    """Returns the value of a static, NaN for unknown; a file may repeat it, but not change it."""
    low, high = PHYSIONET_STATICS[name]
    if value == -1 or np.isnan(value):
        return np.nan
    if not low <= value <= high:
        raise row.wrong("Value", f"{name} from {low:g} to {high:g}, or -1 for unknown")
    if hours != 0:
        raise row.wrong("Time", f"00:00, the time of {name}")
    if not np.isnan(held) and held != value:
        raise row.wrong("Value", f"{name} {held:g} as before; keep the right one")
    return value


def _hours(row: Row) -> float:
    """Returns the hours since the beginning of the stay from HH:MM."""
    time = re.fullmatch(r"(\d{1,2}):([0-5]\d)", row.fields["Time"], re.ASCII)
    hours = int(time[1]) + int(time[2]) / 60 if time else np.inf
    if hours > HOURS:
        raise row.wrong("Time", f"HH:MM from 00:00 to {HOURS:.0f}:00")
    return hours
