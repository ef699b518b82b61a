"""MIMIC-III, in the format of its makers."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cramlab.tasks.irregular.series import DataError, IrregularData
from cramlab.tasks.irregular.text_tables import Row, needed_folder, rows_of
from cramlab.tasks.irregular.visits import REPLACED, Visits, counted

HOURS = 48.0  # hours from admission that are used
# Laboratory values by ITEMID: creatinine, potassium, sodium, urea nitrogen, bicarbonate, chloride,
# hematocrit, white cells, platelets, glucose, lactate, bilirubin, pH, albumin.
MIMIC_ITEMS = (
    50912, 50971, 50983, 51006, 50882, 50902, 51221, 51301, 51265, 50931, 50813, 50885, 50820, 50862,
)  # fmt: skip


@dataclass(frozen=True)
class _Admission:
    """A stay.

    Attributes:
        line: line of the table.
        person: SUBJECT_ID of the patient.
        begin: time of admission.
        end: time of death, or of discharge where no death is given; None: neither is given.
        died: 1 when the stay ended in death, else 0.
    """

    line: int
    person: int
    begin: datetime.datetime
    end: datetime.datetime | None
    died: int

    def hours(self, moment: datetime.datetime) -> float:
        """Returns the hours from admission to a moment."""
        return (moment - self.begin).total_seconds() / 3600


def mimic3(path: Path | None) -> IrregularData:
    """Loads MIMIC-III: predict death in hospital from the laboratory values of the first 48 hours; split by patient.

    Values before admission or after 48 hours and rows without a value are ignored; of several values at one time, the
    last is kept. Stays that ended within the 48 hours, by death or discharge, are left out, as their outcome is known
    by then. So are stays without a laboratory row in those hours.

    Args:
        path: folder with `ADMISSIONS.csv` and `LABEVENTS.csv` as distributed. Without DISCHTIME and DEATHTIME no stay
            is left out for its end, and `notes` says so.

    Raises:
        DataError: when a file is missing or malformed, or files contradict each other.
    """
    folder = needed_folder(path, "mimic3", "ADMISSIONS.csv and LABEVENTS.csv")
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
            f"{labs} holds no value from the first {HOURS:.0f} hours of a stay in {admissions} "
            f"({len(stays)} stays, of which {len(stays) - len(asked)} ended within them); give the files as distributed"
        )
    names = tuple(str(item) for item in MIMIC_ITEMS)
    series = tuple(visits[hadm].series(str(asked[hadm].person), names, [], asked[hadm].died) for hadm in sorted(visits))
    early = [stay for hadm, stay in stays.items() if hadm not in asked]
    return IrregularData(
        name="mimic3", what="death in hospital, from the laboratory values of the first 48 hours", channels=names,
        statics=(), n_classes=2, time_unit=1.0, series=series, origin=f"MIMIC-III, {len(series)} stays",
        notes=counted(
            (sum(stay.died for stay in early), f"stays left out: died within the first {HOURS:.0f} hours"),
            (sum(not stay.died for stay in early), f"stays left out: discharged within the first {HOURS:.0f} hours"),
            (sum(stay.end is None for stay in asked.values()),
             "stays without a known DISCHTIME or DEATHTIME, which may have ended within those hours"),
            (len(asked) - len(visits), "stays left out: no laboratory row in those hours"),
            (n_strangers, f"laboratory rows left out: HADM_ID is not in {admissions.name}"),
            (sum(one.replaced for one in visits.values()), REPLACED),
        ),
    )  # fmt: skip


def _admissions(path: Path) -> dict[int, _Admission]:
    """Returns the stays by HADM_ID.

    Raises:
        DataError: when rows contradict themselves or others; names the first one, and the lines of all.
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
            contradictions.append((row, f"HADM_ID {hadm} differs from line {held.line}"))
    if contradictions:
        row, what = contradictions[0]
        lines = sorted({row.line for row, _ in contradictions})
        others = f"; so do lines {', '.join(map(str, lines[1:]))}" if lines[1:] else ""
        raise row.error(f"the row contradicts itself or another: {what}; correct it or remove it{others}")
    return found
