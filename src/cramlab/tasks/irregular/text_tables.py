"""Reads text tables row by row. Errors name file, line and column, what was expected and what was found."""

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
    """Returns a field's text for messages: at most 40 characters, control characters escaped."""
    text = text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        path: path of the table.
        line: line on which the row ends, from 1.
        fields: values of the requested columns, without surrounding blanks.
    """

    path: Path
    line: int
    fields: dict[str, str]

    def error(self, what: str) -> DataError:
        """Returns an error that names file and line."""
        return DataError(f"{self.path}, line {self.line}: {what}")

    def wrong(self, column: str, expected: str) -> DataError:
        """Returns an error that also names the column, its value and what was expected."""
        return self.error(f'column {column} holds "{shown(self.fields[column])}", expected {expected}')

    def number(self, column: str) -> float:
        """Returns a finite decimal number; NaN for an empty field.

        Raises:
            DataError: when the field holds anything else.
        """
        text = self.fields[column]
        if not text:
            return np.nan
        if not _NUMBER.fullmatch(text) or not abs(value := float(text)) <= LARGEST:
            raise self.wrong(column, f"a number between -{LARGEST:g} and {LARGEST:g}, or nothing")
        return value

    def whole(self, column: str) -> int:
        """Returns a whole number without a sign.

        Raises:
            DataError: when the field holds anything else.
        """
        if not _WHOLE.fullmatch(self.fields[column]):
            raise self.wrong(column, "a whole number")
        return int(self.fields[column])

    def flag(self, column: str) -> int:
        """Returns 0 or 1.

        Raises:
            DataError: when the field holds anything else.
        """
        if self.fields[column] not in ("0", "1"):
            raise self.wrong(column, "0 or 1")
        return int(self.fields[column])

    def moment(self, column: str) -> datetime.datetime:
        """Returns a date with a time of day, without a time zone.

        Raises:
            DataError: when the field holds anything else. Times with and without a zone cannot be compared.
        """
        text = self.fields[column]
        try:
            if _MOMENT.fullmatch(text):
                return datetime.datetime.fromisoformat(text)
        except ValueError:  # such as 30 February
            pass
        raise self.wrong(column, "YYYY-MM-DD HH:MM:SS without a time zone")


def rows_of(path: Path, expected: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; empty lines are skipped.

    Args:
        path: file in UTF-8, with or without a byte order mark, with any line endings; fields may be quoted.
        expected: columns that the file must have.
        optional: columns that the file may have.

    Raises:
        DataError: when the file is missing or not text, lacks a column or has it twice, or a row has more or fewer
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
            raise DataError(f'{path}, line {line}: {columns} ({len(header)} fields in total), found "{held}"')
        yield Row(path, line, {name: fields[place].strip() for name, place in places})


def headless_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a CSV file without a header, with these columns.

    Raises:
        DataError: when the file is missing or not text, or a row has another number of fields.
    """
    expected = f"{len(columns)} fields ({', '.join(columns)})"
    for line, fields in _records(path, expected):
        if len(fields) != len(columns):
            raise DataError(f"{path}, line {line}: expected {expected}, found {len(fields)}")
        yield Row(path, line, dict(zip(columns, (field.strip() for field in fields), strict=True)))


def _records(path: Path, expected: str) -> Iterator[tuple[int, list[str]]]:
    """Yields line number and fields of every record that is not an empty line."""
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; expected a CSV file with {expected}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            begun = reader.line_num + 1
            try:
                fields = next(reader, None)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8 text ({error.reason}); expected {expected}; unpack it if it is compressed"
                ) from None
            except csv.Error as error:
                raise DataError(f"{path}, line {begun}: {error}; expected {expected}") from None
            if fields is None:
                return
            if fields:
                yield reader.line_num, fields


def needed_folder(path: Path | None, name: str, holds: str) -> Path:
    """Returns the folder of a data set.

    Args:
        path: value of --path.
        name: name of the data set.
        holds: what the folder should contain, for the message.

    Raises:
        DataError: when the path is not a folder.
    """
    if path is None or not path.is_dir():
        raise DataError(f"{name} needs --path DIR, a folder with {holds}; found {path}")
    return path
