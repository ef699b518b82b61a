"""Text as documents: Python's own sources, its prose, or the user's files."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cramlab.audit.errors import AuditError

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".rst", ".py")
PACKAGED = ("stdlib", "prose")


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

    A folder holds one document a file (.txt, .md, .rst, .py). A .jsonl file holds one a line, under "text". Any other
    file holds documents parted by lines that say <|endoftext|>.

    Raises:
        AuditError: when nothing is there, or a file is not text.
    """
    if source == "stdlib":
        return Corpus("stdlib", tuple(_stdlib()), f"python {sys.version.split()[0]}")
    if source == "prose":
        return Corpus("prose", tuple(_prose()), f"python {sys.version.split()[0]}")
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        documents = [Document(p.relative_to(path).as_posix(), _read(p)) for p in files]
    elif path.is_file():
        documents = _from_file(path)
    else:
        raise AuditError(f'--text "{source}" does not exist; give a folder, a file, or {" or ".join(PACKAGED)}')
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise AuditError(f'--text "{source}" holds no document; files must end in {", ".join(SUFFIXES)} or .jsonl')
    return Corpus(path.name, tuple(documents))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AuditError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _from_file(path: Path) -> list[Document]:
    text = _read(path)
    if path.suffix != ".jsonl":
        return [Document(f"{path.name}:{i}", part) for i, part in enumerate(text.split(END_OF_TEXT))]
    documents = []
    for i, line in enumerate(text.splitlines()):
        try:
            documents.append(Document(f"{path.name}:{i}", str(json.loads(line)["text"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AuditError(f'{path}, line {i + 1}: not a JSON object with a field "text"') from error
    return documents


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
