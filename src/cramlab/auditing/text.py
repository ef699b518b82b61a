"""Text as documents: Python's own sources, its prose, or the user's files."""

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
    """One text; documents are what is split, cut and resampled."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents and where they are from.

    Attributes:
        name: as the user gave it, without the folders above it.
        documents: in order of name.
        version: what the text depends on besides its name.
        digest: first 16 hex digits of the SHA-256 of all names and texts.
    """

    name: str
    documents: tuple[Document, ...]
    version: str | None = None

    @property
    def digest(self) -> str:
        """See the class."""
        sha = hashlib.sha256()
        for document in self.documents:
            sha.update(f"{document.name}\0{document.text}\0".encode())
        return sha.hexdigest()[:16]

    def described(self) -> dict[str, str | None]:
        """Name, version and digest."""
        return {"name": self.name, "version": self.version, "digest": self.digest}


def read_corpus(source: str) -> Corpus:
    """The documents of `stdlib` (sources of Python's library), `prose` (its help topics), a folder or a file.

    A folder holds one document a file (.txt, .md, .rst, .py); links to other folders are not followed. A .jsonl file
    holds one a line, under "text". Any other file holds documents parted by lines that say <|endoftext|>. Blank
    documents are left out. All is read at once: what is used is what the digest is of, whatever happens to the files.

    Raises:
        AuditError: when nothing is there, or a file is not text; the message names file and line.
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
    """Text files in a folder and the folders in it, by path."""

    def refuse(error: OSError) -> None:
        raise error  # or a folder that cannot be read would be passed over without a word

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
    """What is no file with an end, such as a pipe, would be waited for."""
    if not path.is_file():
        raise AuditError(f"{path} is no regular file but a pipe, a device, or a link to nothing; remove it")


def _refuse_too_large(path: Path, files: Sequence[Path]) -> None:
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes > MOST_BYTES:
        raise AuditError(
            f"{path} holds {n_bytes / 2**30:.1f} GiB of text, and what is audited is held in memory; give a part of at "
            f"most {MOST_BYTES / 2**30:g} GiB"
        )


def _text_of(data: bytes, path: Path, first_line: int = 1) -> str:
    """Bytes as text: UTF-8, without a byte-order mark, lines ending in a line feed as Python reads them."""

    def refuse(at: int, why: str) -> AuditError:
        line = first_line + data.count(b"\n", 0, at)
        return AuditError(f"{path}, line {line}: {why}; convert it to UTF-8 text, or leave it out")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(error.start, f"is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if (at := data.find(b"\0")) >= 0:
        raise refuse(at, f"holds a NUL at byte {at}, which no text does")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _from_file(path: Path) -> list[Document]:
    data, name = path.read_bytes(), _printable(path.name)
    if path.suffix != ".jsonl":
        return [Document(f"{name}:{i}", part) for i, part in enumerate(_text_of(data, path).split(END_OF_TEXT))]
    documents = []
    # At line feeds alone: within strings, JSON allows other ends of lines.
    for i, line in enumerate(data.removeprefix("\ufeff".encode()).split(b"\n")):
        if line.strip():
            documents.append(Document(f"{name}:{i}", _text_in(_text_of(line, path, i + 1), path, i + 1)))
    return documents


def _text_in(line: str, path: Path, number: int) -> str:
    """The text that a line of JSON holds."""

    def refuse(what: str) -> AuditError:
        return AuditError(f"{path}, line {number}: {what}")

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number there")

    try:
        found = json.loads(line, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is no JSON ({error})") from error
    if not isinstance(found, dict) or "text" not in found:
        given = f"only {', '.join(found)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise refuse(f'is not a JSON object with a field "text" but has {given}')
    text = found["text"]
    if not isinstance(text, str):
        raise refuse(f'"text" is {json.dumps(text)[:40]} and not a string')
    if not _is_unicode(text):
        raise refuse('"text" holds half a pair of surrogates, which no text does')
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    """A file's name; bytes in it that are no UTF-8 as escapes, so that it can be written down."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _stdlib() -> Sequence[Document]:
    """Python's library without tests, generated tables and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            documents.append(Document(relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return documents


def _prose() -> Sequence[Document]:
    from pydoc_data.topics import topics  # the one module of prose in Python's library

    return [Document(name, text) for name, text in sorted(topics.items())]
