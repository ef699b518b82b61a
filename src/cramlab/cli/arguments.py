"""Values of flags, checked where they are read: each function here makes a `type` for argparse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from cramlab.errors import UsageError


def whole(flag: str, least: int, most: int) -> Callable[[str], int]:
    """A whole number between two others."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise UsageError(f"{flag} {text!a} is no whole number") from error
        if not least <= value <= most:
            raise UsageError(f"{flag} {text} must be {least} or more, and at most {most:,}")
        return value

    return read


def positive(flag: str, unit: str) -> Callable[[str], float]:
    """A finite number above 0."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise UsageError(f"{flag} {text!a} is no number; give {unit}") from error
        if not 0 < value < math.inf:
            raise UsageError(f"{flag} {text} must be above 0 and finite, in {unit}")
        return value

    return read


def text_of(flag: str) -> Callable[[str], str]:
    """The name of a text: packaged, a file or a folder; a path without a name would be the current folder."""

    def read(text: str) -> str:
        if not text.strip() or "\0" in text:
            raise UsageError(f"{flag} {text!a} names no text; give stdlib, prose, a folder of text files, or a file")
        return text

    return read


def path_of(flag: str) -> Callable[[str], Path]:
    """A path that a system can have."""

    def read(text: str) -> Path:
        if not text or "\0" in text:
            raise UsageError(f"{flag} {text!a} is no path")
        return Path(text)

    return read


def folder_of(flag: str) -> Callable[[str], Path]:
    """A folder that is there or can be made."""

    def read(text: str) -> Path:
        found = path_of(flag)(text)
        for part in (found, *found.parents):
            if part.exists() and not part.is_dir():
                raise UsageError(f"{flag} {text}: {part} is a file; give a folder")
        return found

    return read


def page_of(flag: str) -> Callable[[str], Path]:
    """A page to be written."""

    def read(text: str) -> Path:
        found = path_of(flag)(text)
        if found.suffix not in (".html", ".htm") or found.is_dir():
            raise UsageError(f"{flag} {text} should end in .html, and be no folder")
        folder_of(flag)(str(found.parent))
        return found

    return read
