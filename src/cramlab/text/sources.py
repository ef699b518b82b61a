"""What a text's name stands for: a packaged text, standard input, files, a folder, a pattern, or a data set."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from cramlab.errors import TextError
from cramlab.text import datasets
from cramlab.text.corpus import Corpus, Document
from cramlab.text.files import (
    FORMS,
    MOST_BYTES,
    documents_of,
    from_lines,
    from_plain,
    is_text,
    printable,
    refuse_special,
    refuse_too_large,
)
from cramlab.text.packaged import PACKAGED, packaged

Text: TypeAlias = str | Path | Corpus | Sequence[str] | Sequence[Path]
Kind = Literal["packaged", "input", "folder", "file", "saved", "hub", "pattern"]


def corpus_of(text: Text, field: str | None = None) -> Corpus:
    """Returns the documents of what a Python function was given as text.

    Args:
        text: a corpus, a name or path for `read_corpus`, several paths, or a list of the texts themselves.
        field: as for `read_corpus`.

    Raises:
        TextError: as `read_corpus`, and when a list holds no text, or names of files in place of texts.
    """
    if isinstance(text, Corpus):
        return text
    if isinstance(text, (str, Path)):
        return read_corpus(text, field=field)
    if text and all(isinstance(one, Path) for one in text):
        return read_corpus(*text, field=field)
    if not text or not all(isinstance(one, str) for one in text):
        raise TextError("the list of texts must hold at least one text, each a str; or paths, each a pathlib.Path")
    texts = [str(one) for one in text]
    if all(len(one) < 256 and "\n" not in one and os.path.exists(one) for one in texts):
        raise TextError(f'the list of texts holds paths, such as "{texts[0]}"; give each as a pathlib.Path')
    return Corpus("texts", tuple(Document(f"text {i}", one) for i, one in enumerate(texts)))


def read_corpus(*sources: str | Path, field: str | None = None) -> Corpus:
    """Reads the documents of one or several sources.

    A source is `stdlib` (sources of Python's library) or `prose` (its help topics), a file, a folder, a pattern such as
    `my/**/*.md`, `-` for standard input, a folder that `save_to_disk` of the library datasets wrote, or a data set of
    the hub, OWNER/NAME[:CONFIG][@SPLIT].

    In a folder every plain text (`files.PLAIN`) is a document, and every record of a .jsonl or .parquet file; links to
    other folders are not followed. In a plain file that is named itself, <|endoftext|> separates documents. Any file
    may be gzipped. Blank documents are left out. Everything is read into memory at once, so later changes of the files
    have no effect.

    Args:
        *sources: names and paths.
        field: field of records that holds the text, a string or a list of messages; None: the only one of
            `records.FIELDS`.

    Raises:
        TextError: when a source does not exist or holds no document, or a file is not text; names file, line and byte.
        OSError: when a file or folder cannot be read.
    """
    if not sources:
        raise TextError("no text is given; give at least one file, folder, pattern or name")
    read = [_read(str(source), field) for source in sources]
    if len(read) == 1:
        return read[0]
    documents = tuple(document for corpus in read for document in corpus.documents)
    notes = tuple(note for corpus in read for note in corpus.notes)
    return Corpus(" and ".join(corpus.name for corpus in read), documents, None, notes)


def check_source(source: str, flag: str = "--text") -> Kind:
    """Returns what a name stands for; nothing is read.

    Args:
        source: a name or path.
        flag: the option that it was given with, for the error.

    Raises:
        TextError: when there is no such file or folder, and it can be nothing else.
    """
    if source in PACKAGED:
        return "packaged"
    if source == "-":
        return "input"
    known = source.strip() and "\0" not in source
    path, bare = Path(source), Path(source.rpartition("@")[0])
    if known and path.is_dir():
        return "saved" if datasets.is_saved(path) else "folder"
    if known and path.exists():
        return "file"
    if known and "@" in source and datasets.is_saved(bare):
        return "saved"
    if known and datasets.could_be_on_hub(source):
        return "hub"
    if known and glob.has_magic(source):
        return "pattern"
    raise TextError(
        f'{flag} "{ascii(source)[1:-1]}" does not exist; give a folder, a file, a quoted pattern such as '
        f'"my/**/*.md", - for standard input, OWNER/NAME@SPLIT of the hub, or {" or ".join(PACKAGED)}'
    )


def _read(source: str, field: str | None) -> Corpus:
    kind, path, notes = check_source(source), Path(source), list[str]()
    name = path.name or path.resolve().name
    if kind == "packaged":
        return packaged(source)
    if kind == "input":
        name, documents = "standard input", _from_input(field, notes)
    elif kind == "folder":
        documents = _from_folder(path, field, notes)
    elif kind == "file":
        refuse_special(path)
        refuse_too_large(path, path.stat().st_size)
        documents = documents_of(path, printable(path.name), field, notes)
    elif kind == "saved":
        whole, split = (path, None) if path.is_dir() else (Path(source.rpartition("@")[0]), source.rpartition("@")[2])
        documents = datasets.from_saved(whole, split, field, notes)
    elif kind == "hub":
        name, documents = source, datasets.from_hub(source, field, notes)
    else:
        name, documents = source, _from_pattern(source, field, notes)
    kept = tuple(document for document in documents if document.text.strip())
    if not kept:
        what = "all texts are blank"
        if kind == "folder" and not documents:
            what = f"files must end in {', '.join(form for form in FORMS if form != '.json')}, or one of these and .gz"
        raise TextError(f'--text "{source}" holds no document; {what}')
    if len(kept) < len(documents):
        notes.append(f"{printable(name)}: {len(documents) - len(kept)} blank documents are left out")
    return Corpus(printable(name), kept, None, tuple(notes))


def _from_folder(folder: Path, field: str | None, notes: list[str]) -> list[Document]:
    """Documents below a folder, in order of their files' paths."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk skips unreadable folders by default

    files = sorted(
        Path(below) / name
        for below, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if is_text(Path(name))
    )
    return _from_files(files, lambda path: path.relative_to(folder).as_posix(), str(folder), field, notes)


def _from_pattern(pattern: str, field: str | None, notes: list[str]) -> list[Document]:
    """Documents of all files that a pattern matches, in order of path; ** matches folders at any depth."""
    files = sorted(Path(found) for found in glob.glob(pattern, recursive=True) if not os.path.isdir(found))
    if not files:
        raise TextError(
            f'--text "{pattern}" matches no file; ** matches folders at any depth, and the shell must not expand the '
            "pattern: quote it"
        )
    return _from_files(files, Path.as_posix, pattern, field, notes)


def _from_files(
    files: list[Path], name_of: Callable[[Path], str], what: str, field: str | None, notes: list[str]
) -> list[Document]:
    """Documents of several files; a plain text is one."""
    for file in files:
        refuse_special(file)
    refuse_too_large(what, sum(file.stat().st_size for file in files))
    return [
        document
        for file in files
        for document in documents_of(file, printable(name_of(file)), field, notes, parted=False)
    ]


def _from_input(field: str | None, notes: list[str]) -> list[Document]:
    """Standard input as JSON Lines when its first line that is not blank begins with a brace, else as one text."""
    data = sys.stdin.buffer.read(MOST_BYTES + 1)
    refuse_too_large("standard input", len(data))
    if data.removeprefix("\ufeff".encode()).lstrip().startswith(b"{"):
        return from_lines(data, "standard input", "-", field, notes)
    return from_plain(data, "standard input", "-")
