"""Reads Python's standard library and installed packages as documents, one for each .py file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from cramlab.errors import UsageError
from cramlab.text import Document, read_corpus
from reproduction.sources.source import Source


def read_code(packages: Sequence[str]) -> Iterator[Source]:
    """Yields Python's library without its tests, then the installed packages of these names.

    Raises:
        UsageError: when a package is not installed; raised before the first source is read.
    """
    try:
        installed = [metadata.distribution(name) for name in packages]
    except metadata.PackageNotFoundError as error:
        raise UsageError(f"--packages: {error.name} is not installed; install it, or leave it out") from error
    stdlib = read_corpus("stdlib")
    documents = tuple(Document(f"stdlib/{document.name}", document.text) for document in stdlib.documents)
    yield Source("stdlib", sys.version.split()[0], "PSF-2.0", documents)
    for package in installed:
        yield _source(package)


def _source(package: metadata.Distribution) -> Source:
    files = sorted(str(file) for file in package.files or () if file.suffix == ".py")
    documents = []
    for file in files:
        path = Path(str(package.locate_file(file)))
        if path.is_file():
            documents.append(Document(file, path.read_text(encoding="utf-8", errors="replace")))
    return Source(package.metadata["Name"], package.version, _licence(package.metadata), tuple(documents))


def _licence(about: metadata.PackageMetadata) -> str | None:
    """The licence expression, the licences among the classifiers, or the first line of the licence field."""
    if "License-Expression" in about:
        return about["License-Expression"]
    classified = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier", []) if c.startswith("License :: ")]
    if classified or "License" not in about:
        return ", ".join(classified) or None
    return about["License"].strip().split("\n")[0]
