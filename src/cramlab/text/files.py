"""One file as documents, by its form: plain text, JSON Lines, JSON or Parquet; each of them may be gzipped."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cramlab.errors import TextError
from cramlab.text.corpus import Document
from cramlab.text.records import document_of, field_of

END_OF_TEXT = "<|endoftext|>"
PLAIN = (".txt", ".md", ".rst", ".py", ".tex", ".org", ".html", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go",
         ".rs", ".rb", ".sh", ".sql", ".r", ".jl")  # fmt: skip
FORMS = (*PLAIN, ".jsonl", ".ndjson", ".json", ".parquet")
MOST_BYTES = 4 * 2**30


def form_of(path: Path) -> str:
    """Returns the suffix that tells a file's form, in lower case, without a trailing ".gz"."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def is_text(path: Path) -> bool:
    """Returns whether a file in a folder is read; .json is not, as most such files are settings."""
    return form_of(path) in FORMS and form_of(path) != ".json"


def refuse_special(path: Path) -> None:
    """Raises TextError for a path that is not a regular file, as reading a pipe would block."""
    if not path.is_file():
        raise TextError(f"{path} is not a regular file but a pipe, a device or a broken link; remove it")


def refuse_too_large(what: object, n_bytes: int) -> None:
    """Raises TextError for more text than is read into memory."""
    if n_bytes > MOST_BYTES:
        raise TextError(
            f"{what} holds {n_bytes / 2**30:.1f} GiB of text, which is read into memory at once; give at most "
            f"{MOST_BYTES / 2**30:g} GiB"
        )


def printable(name: str) -> str:
    """Returns a file's name with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def documents_of(
    path: Path, name: str, field: str | None, notes: list[str], *, parted: bool = True
) -> list[Document]:  # fmt: skip
    """Reads a file.

    Args:
        path: the file.
        name: name of the file in those of its documents.
        field: field of records that holds the text; None: it is guessed, see `records.field_of`.
        notes: gets a line on the field, where there are records.
        parted: whether end-of-text marks separate the documents of a plain text; otherwise it is one document.

    Raises:
        TextError: when the file is not text, or a record holds none; names file, line and byte.
        OSError: when it cannot be read.
    """
    refuse_special(path)
    form = form_of(path)
    if form == ".parquet":
        from cramlab.text.datasets import from_parquet

        return from_parquet(path, name, field, notes)
    data = _unzipped(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    if form in (".jsonl", ".ndjson"):
        return from_lines(data, str(path), name, field, notes)
    if form == ".json":
        return _from_json(data, str(path), name, field, notes)
    return from_plain(data, str(path), name) if parted else [Document(name, _text_of(data, str(path)))]


def from_plain(data: bytes, where: str, name: str) -> list[Document]:
    """Returns the documents of a plain text: its parts between end-of-text marks."""
    return [Document(f"{name}:{i}", part) for i, part in enumerate(_text_of(data, where).split(END_OF_TEXT))]


def from_lines(data: bytes, where: str, name: str, field: str | None, notes: list[str]) -> list[Document]:
    """Returns the documents of JSON Lines, one a line; blank lines count in names and errors, but hold none."""
    # Lines end at line feeds alone, as strings in JSON may contain other line separators.
    lines = data.removeprefix("\ufeff".encode()).split(b"\n")
    records = ((i, _json_of(_text_of(line, where, i + 1), f"{where}, line {i + 1}")) for i, line in enumerate(lines)
               if line.strip())  # fmt: skip
    return from_records(records, lambda i: f"{where}, line {i + 1}", name, field, notes)


def from_records(
    records: Iterator[tuple[int, Any]], where: Any, name: str, field: str | None, notes: list[str]
) -> list[Document]:
    """Returns the documents of numbered records, whose text is in the field of the first.

    Args:
        records: number and content of each record.
        where: names a record in errors by its number.
        name: name of the source in those of the documents.
        field: as for `documents_of`.
        notes: as for `documents_of`.
    """
    documents: list[Document] = []
    taken: str | None = None
    for i, record in records:
        if not isinstance(record, dict):
            raise TextError(f"{where(i)}: is not a JSON object with fields but a {type(record).__name__}")
        if taken is None:
            taken = field_of(record, field, where(i))
            note(notes, taken, record)
        elif taken not in record:
            field_of(record, taken, where(i))
        documents.append(document_of(f"{name}:{i}", record[taken], taken, where(i)))
    return documents


def note(notes: list[str], taken: str, names: Iterable[str]) -> None:
    """Adds a line on the field that the text is taken from, once."""
    others = ", ".join(name for name in names if name != taken)
    line = f'texts are taken from the field "{taken}"' + (f"; the others ({others}) are not read" if others else "")
    if line not in notes:
        notes.append(line)


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TextError(f"{path} is no whole gzip file ({error}); copy it again, or leave it out") from error
    refuse_too_large(path, len(data))
    return data


def _text_of(data: bytes, where: str, first_line: int = 1) -> str:
    """Decodes UTF-8, removes a byte-order mark and ends lines in a line feed, as Python's text mode does."""

    def refuse(at: int, why: str) -> TextError:
        line = first_line + data.count(b"\n", 0, at)
        return TextError(f"{where}, line {line}: {why}; convert it to UTF-8 text, or leave it out")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(error.start, f"is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if (at := data.find(b"\0")) >= 0:
        raise refuse(at, f"holds a NUL at byte {at}, which text does not contain")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _from_json(data: bytes, where: str, name: str, field: str | None, notes: list[str]) -> list[Document]:
    """One object is a record, a list of objects is records."""
    found = _json_of(_text_of(data, where), where)
    records = found if isinstance(found, list) else [found]
    return from_records(iter(enumerate(records)), lambda i: f"{where}, record {i}", name, field, notes)


def _json_of(text: str, where: str) -> Any:
    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: is not JSON ({error})") from error
