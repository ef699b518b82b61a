"""Bad clinical tables: rows with values of another kind than their column's, and files of another kind."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cramlab.tasks.irregular import DataError, load
from cramlab.tasks.irregular.person_activity import ACTIVITY_TAGS
from faults.bad_files import GROSS
from faults.bad_settings import thinned
from faults.cases import Case, Fault, FaultFoundError, RefusedError
from faults.material import fresh, stay

# Values that no field of a table may hold: malformed numbers and times, other characters.
NO_NUMBER = ("x", "inf", "-inf", "1e999", "1,5", "0x1", "²", "9" * 5_000, "1 2", "--1", "é", "\ufeff1", "True")
NO_TIME = ("x", "1", "25", ":", "1:", ":1", "01:60", "01:99", "-1:00", "²1:00", "1:2:3", "", "01.5", "nan", "01:0x")
NO_MOMENT = ("x", "2101", "2101-13-01 00:00:00", "2101-02-30 00:00:00", "01/02/2101", "", "nan", "0", "²")
NO_FLAG = ("", "2", "x", "-1", "nan", "yes", "0.5", "²", "1,")


def cases(seed: int, share: float) -> Iterator[Case]:
    """The three data sets that users bring."""
    for maker in (_physionet, _mimic, _activity):
        yield from thinned(list(maker(seed)), share, seed)


def _case(name: str, write: Callable[[], tuple[str, Path]], check: Callable[[Any], str] | None) -> Case:
    return Case("clinical tables", name, functools.partial(_read, write, check))


def _read(write: Callable[[], tuple[str, Path]], check: Callable[[Any], str] | None) -> None:
    """Checks that a file is refused; if `check` is given, that it is refused or passes the check."""
    kind, path = write()
    try:
        found = load(kind, path)
    except DataError as error:
        if len(str(error).splitlines()) != 1:
            raise FaultFoundError(Fault.UNCLEAR, f"several lines: {str(error)[:200]!r}") from error
        raise RefusedError(str(error)) from error
    if check is None:
        raise FaultFoundError(Fault.ACCEPTED, f"read as {len(found.series)} series")
    if said := check(found):
        raise FaultFoundError(Fault.WRONG, said)


def _finite(data: Any) -> str:
    """Describes what is infinite in a data set; None if nothing is."""
    for series in data.series:
        if any(math.isinf(value) for value in series.values.flatten()) or not all(map(math.isfinite, series.times)):
            return f"person {series.person} has an infinite value or time"
        if any(later < before for before, later in zip(series.times, series.times[1:], strict=False)):
            return f"the visits of person {series.person} go backwards"
    return ""


# PhysioNet 2012.


def _stays(rows: str = "", outcomes: str = "", changed: Callable[[str], str] = str) -> tuple[str, Path]:
    path = fresh("physionet")
    (path / "set-a").mkdir(parents=True)
    rng = random.Random(0)
    table = ["RecordID,In-hospital_death", *(f"{i},{i % 2}" for i in range(8))]
    for i in range(8):
        text = stay(rng) + (rows + "\n" if rows and i == 3 else "")
        (path / "set-a" / f"{i}.txt").write_bytes(
            (changed(text) if i == 3 else text).encode("utf-8", "surrogateescape")
        )
    (path / "Outcomes-a.txt").write_text("\n".join(table) + "\n" + outcomes, encoding="utf-8")
    return "physionet2012", path


def _physionet(seed: int) -> Iterator[Case]:
    for value in NO_NUMBER:
        yield _case(f"physionet2012: value {value[:12]!r}", functools.partial(_stays, f"02:00,HR,{value}"), None)
    for time in NO_TIME:
        yield _case(f"physionet2012: time {time!r}", functools.partial(_stays, f"{time},HR,80"), None)
    for label in NO_FLAG:
        yield _case(f"physionet2012: label {label!r}", functools.partial(_stays, outcomes=f"8,{label}\n"), None)
    rows = {
        "a row that is too short": "02:00,HR", "a row of one field": "x", "two labels": "",
        "a quote that never ends": '02:00,"HR,80',
    }  # fmt: skip
    for name, row in rows.items():
        more = "3,0\n" if name == "two labels" else ""
        yield _case(f"physionet2012: {name}", functools.partial(_stays, row, more), None)
    changes: dict[str, Callable[[str], str]] = {
        "no header": lambda text: text.partition("\n")[2],
        "a column missing": lambda text: text.replace("Value", "Val", 1),
        "semicolons": lambda text: text.replace(",", ";"),
        "NUL": lambda text: text.replace("HR", "H\0R", 1),
        "not UTF-8": lambda text: text.replace("HR", "H\udcffR", 1),
    }
    for name, change in changes.items():
        check = _finite if name == "NUL" else None
        yield _case(f"physionet2012: {name}", functools.partial(_stays, changed=change), check)
    same: dict[str, Callable[[str], str]] = {
        "CRLF": lambda text: text.replace("\n", "\r\n"),
        "byte-order mark": lambda text: "\ufeff" + text,
        "empty lines": lambda text: text.replace("\n", "\n\n"),
        "spaces in the header": lambda text: text.replace("Time,Parameter,Value", "Time, Parameter ,Value", 1),
        "rows in another order": lambda text: _shuffled(text, seed),
        "an unknown parameter": lambda text: text + "02:00,Mood,5\n",
        "unknown values (-1)": lambda text: text + "02:00,Mood,-1\n",
    }
    for name, change in same.items():
        yield _case(f"physionet2012: {name}", functools.partial(_stays, changed=change), _same_as_plain)
    for name, damage in GROSS.items():
        if name not in ("cut by one byte", "cut in the middle"):
            data = damage(b"Time,Parameter,Value\n", random.Random(seed)).decode("utf-8", "surrogateescape")
            yield _case(f"physionet2012: {name}", functools.partial(_stays, changed=lambda _, d=data: d), None)


def _shuffled(text: str, seed: int) -> str:
    header, *rows = text.strip().split("\n")
    random.Random(seed).shuffle(rows)
    return "\n".join([header, *rows]) + "\n"


def _same_as_plain(data: Any) -> str:
    """Describes how a data set differs from that of the plain files; None if it does not."""
    plain = {series.person: series for series in load(*_stays()).series}
    for series in data.series:
        wanted = plain[series.person]
        if series.values.shape != wanted.values.shape or not _equal(series.values, wanted.values):
            return f"person {series.person} has other values than in the plain file"
        if not _equal(series.statics, wanted.statics):
            return f"person {series.person} has other statics than in the plain file"
    return "" if len(data.series) == len(plain) else f"{len(data.series)} of {len(plain)} people"


def _equal(a: Any, b: Any) -> bool:
    return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a.flatten(), b.flatten(), strict=True))


# MIMIC-III.


def _mimic_files(
    admissions: str = "", labs: str = "", changed: Callable[[str], str] = str, file: str = ""
) -> tuple[str, Path]:
    path = fresh("mimic")
    path.mkdir()
    tables = {
        "ADMISSIONS.csv": "SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DEATHTIME,HOSPITAL_EXPIRE_FLAG\n" + "".join(
            f"{i},{100 + i},2101-01-0{i} 00:00:00,2101-01-2{i} 00:00:00,{dead},{flag}\n"
            for i, (dead, flag) in enumerate([("", 0), ("2101-01-09 00:00:00", 1), ("", 0)], start=1)
        ) + admissions,
        "LABEVENTS.csv": "SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUENUM\n" + "".join(
            f"{i},{100 + i},50912,2101-01-0{i} 0{hour}:00:00,1.{hour}\n" for i in (1, 2, 3) for hour in (1, 3, 5)
        ) + labs,
    }  # fmt: skip
    for name, text in tables.items():
        (path / name).write_bytes((changed(text) if name == file else text).encode("utf-8", "surrogateescape"))
    return "mimic3", path


def _mimic(seed: int) -> Iterator[Case]:
    for value in NO_NUMBER:
        row = f"1,101,50912,2101-01-01 07:00:00,{value}\n"
        yield _case(f"mimic3: value {value[:12]!r}", functools.partial(_mimic_files, labs=row), None)
    for moment in NO_MOMENT:
        row = f"1,101,50912,{moment},1.0\n"
        yield _case(f"mimic3: chart time {moment!r}", functools.partial(_mimic_files, labs=row), None)
        row = f"4,104,{moment},2101-01-20 00:00:00,,0\n"
        yield _case(f"mimic3: admission {moment!r}", functools.partial(_mimic_files, row), None)
    for flag in NO_FLAG:
        row = f"4,104,2101-01-01 00:00:00,2101-01-20 00:00:00,,{flag}\n"
        yield _case(f"mimic3: flag {flag!r}", functools.partial(_mimic_files, row), None)
    twice = "1,101,2101-01-01 00:00:00,2101-01-21 00:00:00,,1\n"
    yield _case("mimic3: one admission with two outcomes", functools.partial(_mimic_files, twice), None)
    zone = "1,101,50912,2101-01-01 01:00:00+02:00,1\n"
    yield _case("mimic3: mixed time zones", functools.partial(_mimic_files, labs=zone), None)
    blank = "1,101,50912,2101-01-01 01:00:00,\n"
    yield _case("mimic3: a blank repeat", functools.partial(_mimic_files, labs=blank), _first_creatinine)
    early = ("4,104,2101-01-04 00:00:00,2101-01-04 20:00:00,2101-01-04 20:00:00,1\n",
             "4,104,50912,2101-01-04 03:00:00,2\n")  # fmt: skip
    yield _case("mimic3: a death within what is looked at", functools.partial(_mimic_files, *early), _without_4)
    for file in ("ADMISSIONS.csv", "LABEVENTS.csv"):
        for name, damage in GROSS.items():
            if name not in ("cut by one byte", "cut in the middle"):
                data = damage(b"SUBJECT_ID,HADM_ID\n", random.Random(seed)).decode("utf-8", "surrogateescape")
                write = functools.partial(_mimic_files, changed=lambda _, d=data: d, file=file)
                yield _case(f"mimic3, {file}: {name}", write, None)


def _first_creatinine(data: Any) -> str:
    values = {series.person: series.values for series in data.series}
    return "" if values["1"][0, 0] == 1.1 else f"creatinine {values['1'][0, 0]} where 1.1 was measured"


def _without_4(data: Any) -> str:
    return "person 4, dead at hour 20, is asked for" if "4" in {series.person for series in data.series} else ""


# UCI person activity.


def _activity_file(row: str = "", changed: Callable[[str], str] = str) -> tuple[str, Path]:
    path = fresh("activity", "ConfLongDemo_JSI.txt")
    lines = [
        f"A01,{ACTIVITY_TAGS[i % 4]},{6337902793 * 10**8 + i * 10**6},27.05.2009 14:03:25:127,1.{i},2.0,0.5,walking"
        for i in range(20)
    ]
    text = "\n".join([*lines, *([row] if row else [])]) + "\n"
    path.write_bytes(changed(text).encode("utf-8", "surrogateescape"))
    return "person-activity", path


def _activity(seed: int) -> Iterator[Case]:
    good = ["A01", ACTIVITY_TAGS[0], str(6337902793 * 10**8 + 10**9), "27.05.2009", "1.0", "2.0", "0.5", "walking"]
    for place, values in ((1, ("", "x", "é")), (2, ("", "x", "-1", "1.5", "²", "nan", "9" * 5_000)),
                          (4, NO_NUMBER), (6, NO_NUMBER), (7, ("", "x", "Walking!"))):  # fmt: skip
        for value in values:
            row = ",".join([*good[:place], value, *good[place + 1 :]])
            yield _case(f"person-activity: field {place} {value[:12]!r}", functools.partial(_activity_file, row), None)
    for name, row in (("too short", ",".join(good[:-1])), ("too long", ",".join([*good, "x"])), ("one word", "x")):
        yield _case(f"person-activity: {name}", functools.partial(_activity_file, row), None)
    for name, damage in GROSS.items():
        if name not in ("cut by one byte", "cut in the middle"):
            data = damage(b"A01,x\n", random.Random(seed)).decode("utf-8", "surrogateescape")
            yield _case(
                f"person-activity: {name}", functools.partial(_activity_file, changed=lambda _, d=data: d), None
            )
