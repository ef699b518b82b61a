"""Reads text as documents: the sources of Python's library, its help topics, or the user's files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cramlab.errors import AuditError

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".rst", ".py")
PACKAGED = ("stdlib", "prose")
MOST_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Document:
    """One text with its name: the unit of splitting and resampling."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents and their source.

    Attributes:
        name: name of the source, without the folders above it.
        documents: documents in order of name.
        version: version of the source, such as that of Python; None: it has none.
    """

    name: str
    documents: tuple[Document, ...]
    version: str | None = None

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all names and texts."""
        sha = hashlib.sha256()
        for document in self.documents:
            sha.update(f"{document.name}\0{document.text}\0".encode())
        return sha.hexdigest()[:16]

    def described(self) -> dict[str, str | None]:
        """Returns name, version and digest, as records hold them."""
        return {"name": self.name, "version": self.version, "digest": self.digest}


def read_corpus(source: str) -> Corpus:
    """Reads the documents of `stdlib` (sources of Python's library), `prose` (its help topics), a folder or a file.

    In a folder, each .txt, .md, .rst and .py file is a document; links to other folders are not followed. In a .jsonl
    file, each line is a document, under "text". In any other file, <|endoftext|> separates documents. Blank documents
    are left out. Everything is read into memory at once, so later changes of the files have no effect.

    Raises:
        AuditError: when the source does not exist or holds no document, or a file is not text; names file and line.
        OSError: when a file or folder cannot be read.
    """
    if source == "stdlib":
        return Corpus("stdlib", tuple(_stdlib()), f"python {sys.version.split()[0]}")
    if source == "prose":
        return Corpus("prose", tuple(_prose()), f"python {sys.version.split()[0]}")
    path = Path(source)
    if path.is_dir():
        files = _files_below(path)
        _refuse_too_large(path, files)
        documents = [Document(_printable(p.relative_to(path).as_posix()), _text_of(p.read_bytes(), p)) for p in files]
        what = f"files must end in {', '.join(SUFFIXES)}"
    elif path.exists():
        _refuse_special(path)
        _refuse_too_large(path, [path])
        documents = _from_file(path)
        what = "the file is blank"
    else:
        raise AuditError(f'--text "{source}" does not exist; give a folder, a file, or {" or ".join(PACKAGED)}')
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise AuditError(f'--text "{source}" holds no document; {what}')
    return Corpus(_printable(path.name or path.resolve().name), tuple(documents))


def _files_below(folder: Path) -> list[Path]:
    """Returns the text files in a folder and its subfolders, sorted by path."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk skips unreadable folders by default

    found = [
        Path(below) / name
        for below, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if Path(name).suffix in SUFFIXES
    ]
    for path in found:
        _refuse_special(path)
    return sorted(found)


def _refuse_special(path: Path) -> None:
    """Raises AuditError for a path that is not a regular file, as reading a pipe would block."""
    if not path.is_file():
        raise AuditError(f"{path} is not a regular file but a pipe, a device or a broken link; remove it")


def _refuse_too_large(path: Path, files: Sequence[Path]) -> None:
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes > MOST_BYTES:
        raise AuditError(
            f"{path} holds {n_bytes / 2**30:.1f} GiB of text, which is read into memory at once; give at most "
            f"{MOST_BYTES / 2**30:g} GiB"
        )


def _text_of(data: bytes, path: Path, first_line: int = 1) -> str:
    """Decodes UTF-8, removes a byte-order mark and ends lines in a line feed, as Python's text mode does."""

    def refuse(at: int, why: str) -> AuditError:
        line = first_line + data.count(b"\n", 0, at)
        return AuditError(f"{path}, line {line}: {why}; convert it to UTF-8 text, or leave it out")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(error.start, f"is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if (at := data.find(b"\0")) >= 0:
        raise refuse(at, f"holds a NUL at byte {at}, which text does not contain")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _from_file(path: Path) -> list[Document]:
    data, name = path.read_bytes(), _printable(path.name)
    if path.suffix != ".jsonl":
        return [Document(f"{name}:{i}", part) for i, part in enumerate(_text_of(data, path).split(END_OF_TEXT))]
    documents = []
    # Lines end at line feeds alone, as strings in JSON may contain other line separators.
    for i, line in enumerate(data.removeprefix("\ufeff".encode()).split(b"\n")):
        if line.strip():
            documents.append(Document(f"{name}:{i}", _text_in(_text_of(line, path, i + 1), path, i + 1)))
    return documents


def _text_in(line: str, path: Path, number: int) -> str:
    """Returns the text that a line of JSON holds."""

    def refuse(what: str) -> AuditError:
        return AuditError(f"{path}, line {number}: {what}")

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        found = json.loads(line, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not JSON ({error})") from error
    if not isinstance(found, dict) or "text" not in found:
        given = f"only {', '.join(found)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise refuse(f'is not a JSON object with a field "text" but has {given}')
    text = found["text"]
    if not isinstance(text, str):
        raise refuse(f'"text" is {json.dumps(text)[:40]} and not a string')
    if not _is_unicode(text):
        raise refuse('"text" holds half of a surrogate pair, which text does not contain')
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    """Returns a file's name with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _stdlib() -> Sequence[Document]:
    """Returns the sources of Python's library without tests, generated tables and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            documents.append(Document(relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return documents


def _prose() -> Sequence[Document]:
    from pydoc_data.topics import topics

    return [Document(name, text) for name, text in sorted(topics.items())]
