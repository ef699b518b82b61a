"""Checks of arguments while they are parsed: each function makes a `type` for argparse."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from cramlab.errors import TextError, UsageError
from cramlab.text.corpus import Chat
from cramlab.text.records import FIELDS
from cramlab.text.sources import check_source

_MODELS = ("smollm2", "glassllm")  # see `hf.loading.PACKAGED`


def whole(flag: str, least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise UsageError(f"{flag} {text!a} is not a whole number") from error
        if not least <= value <= most:
            raise UsageError(f"{flag} {text} must be {least} or more, and at most {most:,}")
        return value

    return read


def positive(flag: str, unit: str) -> Callable[[str], float]:
    """A finite number above 0."""

    def read(text: str) -> float:
        value = _float(flag, text, unit)
        if not 0 < value < math.inf:
            raise UsageError(f"{flag} {text} must be above 0 and finite, in {unit}")
        return value

    return read


def temperature(flag: str) -> Callable[[str], float]:
    """A finite number of at least 0."""

    def read(text: str) -> float:
        value = _float(flag, text, "a temperature, such as 0.7")
        if not 0 <= value < math.inf:
            raise UsageError(f"{flag} {text} must be 0 or more, and finite")
        return value

    return read


def _float(flag: str, text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!a} is not a number; give {wanted}") from error


def text_of(flag: str, *others: str) -> Callable[[str], str]:
    """A text: what `cramlab.text.read_corpus` takes, or one of `others`."""

    def read(text: str) -> str:
        try:
            if text not in others:
                check_source(text, flag)
        except TextError as error:  # argparse has its own words for a ValueError
            raise UsageError(str(error)) from error
        return text

    return read


def add_text(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds the options of the text: --text, --text-field and --chat."""
    parser.add_argument(
        "--text",
        type=text_of("--text"),
        required=True,
        action="append",
        metavar="TEXT",
        help=f"{about}: a file, a folder, a quoted pattern, - for standard input, a data set of the hub "
        "(OWNER/NAME[:CONFIG]@SPLIT), stdlib or prose, see below; may be repeated",
    )
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of records that holds the text, or the messages of a conversation (default: the only one of "
        f"{', '.join(FIELDS)})",
    )
    parser.add_argument(
        "--chat",
        choices=get_args(Chat),
        default="template",
        help="write conversations as the tokenizer's chat template does, or join their messages (default: template)",
    )


TEXTS = """
texts:
  book.txt  notes/  "src/**/*.py"                one document a file; a long one is cut where documents are few
  chats.jsonl  rows.parquet  texts.jsonl.gz      one document a record, see --text-field
  saved/  saved/@train                           what datasets' save_to_disk wrote
  OWNER/NAME@train  OWNER/NAME:CONFIG@train      a data set of the hub: pip install "cramlab[datasets]"
  -                                              standard input, one text or JSON Lines
  stdlib  prose                                  Python's own sources and help topics
"""


def model_of(flag: str) -> Callable[[str], str]:
    """A model: packaged, a folder or file that exists, or a name that the Hugging Face hub may have."""

    def read(text: str) -> str:
        is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(".gguf")
        if not text or "\0" in text or (is_path and not Path(text).exists()):
            raise UsageError(
                f"{flag} {text!a} does not exist; give a folder, a name of the hub, or one of {', '.join(_MODELS)}"
            )
        return text

    return read


def path_of(flag: str) -> Callable[[str], Path]:
    """A path that the system can have."""

    def read(text: str) -> Path:
        if not text or "\0" in text:
            raise UsageError(f"{flag} {text!a} is not a path")
        return Path(text)

    return read


def existing(flag: str) -> Callable[[str], Path]:
    """A path that exists."""

    def read(text: str) -> Path:
        found = path_of(flag)(text)
        if not found.exists():
            raise UsageError(f"{flag} {text} does not exist")
        return found

    return read


def run_folder(flag: str, *files: str) -> Callable[[str], Path]:
    """The folder of one run, which holds these files."""

    def read(text: str) -> Path:
        found = existing(flag)(text)
        for name in files:
            if not (found / name).is_file():
                raise UsageError(f"{flag} {text} holds no {name}; give the folder of one run")
        return found

    return read


def folder_of(flag: str) -> Callable[[str], Path]:
    """A folder that exists or can be made."""

    def read(text: str) -> Path:
        found = path_of(flag)(text)
        for part in (found, *found.parents):
            if part.exists() and not part.is_dir():
                raise UsageError(f"{flag} {text}: {part} is a file; give a folder")
        return found

    return read


def page_of(flag: str) -> Callable[[str], Path]:
    """An HTML file to write."""

    def read(text: str) -> Path:
        found = path_of(flag)(text)
        if found.suffix not in (".html", ".htm") or found.is_dir():
            raise UsageError(f"{flag} {text} must end in .html and must not be a folder")
        folder_of(flag)(str(found.parent))
        return found

    return read


def consolidation_in(path: Path) -> Path | None:
    """The folder of a consolidation, which the path or its record names; None for any other path."""
    record = path if path.name == "consolidation.json" else path / "consolidation.json"
    return record.parent if record.is_file() else None
