"""Text tables, row by row. Every fault is named with file, line, column, what was expected and what was found."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cramlab.tasks.irregular.series import LARGEST, DataError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?", re.ASCII)


def shown(text: str) -> str:
    """At most 40 characters of what a field holds, none of which a terminal obeys."""
    text = text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        path: of the table.
        line: on which the row ends, from 1.
        fields: what stands in the columns that were asked for, without blanks around it.
    """

    path: Path
    line: int
    fields: dict[str, str]

    def error(self, what: str) -> DataError:
        """An error that names file and line."""
        return DataError(f"{self.path}, line {self.line}: {what}")

    def wrong(self, column: str, expected: str) -> DataError:
        """An error that also names the column, what it holds and what was expected."""
        return self.error(f'column {column} holds "{shown(self.fields[column])}", expected {expected}')

    def number(self, column: str) -> float:
        """A finite decimal number; NaN for an empty field.

        Raises:
            DataError: for anything else.
        """
        text = self.fields[column]
        if not text:
            return np.nan
        if not _NUMBER.fullmatch(text) or not abs(value := float(text)) <= LARGEST:
            raise self.wrong(column, f"a number between -{LARGEST:g} and {LARGEST:g}, or nothing")
        return value

    def whole(self, column: str) -> int:
        """A whole number without a sign.

        Raises:
            DataError: for anything else.
        """
        if not _WHOLE.fullmatch(self.fields[column]):
            raise self.wrong(column, "a whole number")
        return int(self.fields[column])

    def flag(self, column: str) -> int:
        """What a column of zeros and ones holds.

        Raises:
            DataError: for anything else.
        """
        if self.fields[column] not in ("0", "1"):
            raise self.wrong(column, "0 or 1")
        return int(self.fields[column])

    def moment(self, column: str) -> datetime.datetime:
        """A date with a time of day, without a time zone.

        Raises:
            DataError: for anything else; times of several zones cannot be compared with those of none.
        """
        text = self.fields[column]
        try:
            if _MOMENT.fullmatch(text):
                return datetime.datetime.fromisoformat(text)
        except ValueError:  # such as 30 February
            pass
        raise self.wrong(column, "YYYY-MM-DD HH:MM:SS without a time zone")


def rows_of(path: Path, expected: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a CSV file with a header that names (at least) the expected columns; empty lines are skipped.

    Args:
        path: UTF-8, with or without a byte order mark; any line ends; fields may be quoted.
        expected: columns that must be there.
        optional: columns that may be.

    Raises:
        DataError: when the file is missing, is no text, lacks a column, has one twice, or has a row of more or fewer
            fields than the header.
    """
    columns = f"expected columns {', '.join(expected)}"
    records = _records(path, f"columns {', '.join(expected)}")
    header = [name.strip() for name in next(records, (0, []))[1]]
    found = ", ".join(shown(name) for name in header[:20]) or "nothing"
    if missing := [name for name in expected if name not in header]:
        raise DataError(f"{path} lacks {', '.join(missing)}; {columns}, found {found}")
    wanted = [name for name in (*expected, *optional) if name in header]
    if twice := [name for name in wanted if header.count(name) > 1]:
        raise DataError(f"{path} has column {', '.join(twice)} more than once; {columns}, found {found}")
    places = [(name, header.index(name)) for name in wanted]
    for line, fields in records:
        if len(fields) != len(header):
            held = shown(", ".join(fields))
            raise DataError(f'{path}, line {line}: {columns} ({len(header)} fields in all), found "{held}"')
        yield Row(path, line, {name: fields[place].strip() for name, place in places})


def headless_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file without a header, whose columns are these.

    Raises:
        DataError: when the file is missing, is no text, or has a row of another number of fields.
    """
    expected = f"{len(columns)} fields ({', '.join(columns)})"
    for line, fields in _records(path, expected):
        if len(fields) != len(columns):
            raise DataError(f"{path}, line {line}: expected {expected}, found {len(fields)}")
        yield Row(path, line, dict(zip(columns, (field.strip() for field in fields), strict=True)))


def _records(path: Path, expected: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every record that is not an empty line."""
    if not path.is_file():
        state = "is no file" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; expected a CSV file with {expected}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            begun = reader.line_num + 1
            try:
                fields = next(reader, None)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is no UTF-8 text ({error.reason}); expected {expected}; unpack it if it is packed"
                ) from None
            except csv.Error as error:
                raise DataError(f"{path}, line {begun}: {error}; expected {expected}") from None
            if fields is None:
                return
            if fields:
                yield reader.line_num, fields
