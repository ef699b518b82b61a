"""Files that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def partial_path(path: Path) -> Path:
    """Where this process writes a file before it is put in its place; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a complete file to its final name, once its bytes are on disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    put_in_place(partial, path)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically; refuses NaN and infinities, which are no JSON."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Holds a folder, making it if needed, against other processes; the system lets go when this one dies.

    Raises:
        FileExistsError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is writing into {folder}; wait for it or end it") from error
        yield
    finally:
        os.close(handle)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain data atomically."""
    partial = partial_path(path)
    torch.save(state, partial)
    put_in_place(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote; executes no code that the file may hold."""
    return torch.load(path, map_location="cpu", weights_only=True)
