"""Texts that come with Python: the sources of its library and its help topics."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from cramlab.text.corpus import Corpus, Document

PACKAGED = ("stdlib", "prose")


def packaged(name: str) -> Corpus:
    """Returns the corpus of a name of `PACKAGED`."""
    documents = _stdlib() if name == "stdlib" else _prose()
    return Corpus(name, tuple(documents), f"python {sys.version.split()[0]}")


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
