"""Reads documentation in Debian's packages, and Wikipedia pages in gensim's test data, as plain text.

Packages are downloaded and unpacked into a temporary folder; nothing is installed.
"""

from __future__ import annotations

import bz2
import gzip
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cramlab.errors import UsageError
from cramlab.text import Document
from reproduction.sources import plain_text
from reproduction.sources.source import Source

Plain = Callable[[str], str]


@dataclass(frozen=True)
class DebianDocs:
    """Where a Debian package holds its documentation.

    Attributes:
        package: name of the package.
        licence: licence of the documentation, as the package's copyright file states it.
        patterns: glob patterns of its files, from the root of the package; "*" stands for a version.
        left_out: files with one of these words in their path are left out.
        plain: makes plain text of a file.
    """

    package: str
    licence: str
    patterns: tuple[str, ...]
    plain: Plain
    left_out: tuple[str, ...] = ()


DEBIAN = (
    DebianDocs(
        "linux-doc-6.1",
        "GPL-2.0",
        ("usr/share/doc/*/html/_sources/**/*.rst.txt", "usr/share/doc/*/Documentation/**/*.txt.gz"),
        plain_text.from_rst,
        left_out=("/translations/",),
    ),
    DebianDocs("python3.11-doc", "PSF-2.0", ("usr/share/doc/*/html/_sources/**/*.rst.txt",), plain_text.from_rst),
    DebianDocs("perl-doc", "Artistic or GPL-1+", ("usr/share/perl/**/*.pod",), plain_text.from_pod),
    DebianDocs("postgresql-doc-15", "PostgreSQL", ("usr/share/doc/*/html/*.html",), plain_text.from_html),
    DebianDocs(
        "debian-handbook", "GPL-2.0+ or CC-BY-SA-3.0", ("usr/share/doc/*/html/en-US/*.html",), plain_text.from_html
    ),
)
WIKIPEDIA = "gensim==4.4.0"


def read_english() -> Iterator[Source]:
    """Yields the documents of each package, after its download.

    Raises:
        UsageError: when a package cannot be downloaded; names it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for i, docs in enumerate(DEBIAN):
            yield _debian(docs, Path(folder) / str(i))
        yield _wikipedia(Path(folder) / "wikipedia")


def _debian(docs: DebianDocs, folder: Path) -> Source:
    folder.mkdir()
    _run(["apt-get", "--quiet", "download", docs.package], folder, docs.package)
    archive = next(folder.glob("*.deb"))
    version = _run(["dpkg-deb", "--field", archive.name, "Version"], folder, docs.package).strip()
    root = folder / "unpacked"
    _run(["dpkg", "--extract", archive.name, root.name], folder, docs.package)
    documents = []
    for path in sorted({path.resolve() for pattern in docs.patterns for path in root.glob(pattern)}):
        name = path.relative_to(root.resolve()).as_posix()  # links to a folder do not count twice
        if path.is_file() and not any(word in name for word in docs.left_out):
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            documents.append(Document(f"{docs.package}/{name}", docs.plain(data.decode("utf-8", errors="replace"))))
    return Source(docs.package, version, docs.licence, tuple(documents))


def _wikipedia(folder: Path) -> Source:
    """The first pages of the English Wikipedia, of which the wheel of gensim holds a part as test data."""
    folder.mkdir()
    name, version = WIKIPEDIA.split("==")
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", WIKIPEDIA], folder, name)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        inside = next(n for n in wheel.namelist() if "enwiki" in n and n.endswith("shortened.bz2"))
        pages = plain_text.wikipedia_pages(bz2.decompress(wheel.read(inside)))
    documents = tuple(Document(f"wikipedia/{title}", text) for title, text in sorted(pages))
    return Source(f"wikipedia in {name}", version, "CC-BY-SA-3.0", documents)


def _run(command: list[str], folder: Path, package: str) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise UsageError(f"{package} cannot be had: {' '.join(command)} failed ({why})") from error
