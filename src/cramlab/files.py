"""Writes files completely or not at all: to a temporary file, which is then renamed; damaged files are refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cramlab.errors import CramlabError

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DamagedFileError(CramlabError, ValueError):
    """A file is cut, altered, or belongs to something else."""


def partial_path(path: Path) -> Path:
    """Path of the temporary file that this process writes before it is renamed to `path`; makes the folder.

    Temporary files that dead processes left for the same path are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(path.parent.glob(f".{glob.escape(path.name)}.*.partial"))
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a complete file to its final name, once its bytes are on disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` at the end; after an error nothing is left of it.

    Raises:
        OSError: when `path`, which it names, cannot be written; also for a library's own error about a full disk.
    """
    partial = partial_path(path)
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        refuse_full_disk(error, path)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def refuse_full_disk(error: BaseException, path: Path) -> None:
    """Raises an `OSError` that names the path, if an error of any library is about a full disk."""
    full = next((n for n in _FULL if os.strerror(n) in str(error)), None)
    if full is not None:
        raise OSError(full, f"{os.strerror(full)}; make room, then run it again", str(path)) from error


def finished(path: Path, *, resume: bool) -> bool:
    """Whether work in the folder of `path` is finished: then `path`, its result, exists and is kept.

    Raises:
        FileExistsError: when the result or unfinished work (a folder `state`) exists and `resume` is false.
    """
    state = path.parent / "state"
    if (found := path if path.exists() else state).exists() and not resume:
        what = "exists already; keep it" if found == path else "holds unfinished work; continue it"
        raise FileExistsError(f"{found} {what} with --resume (resume=True), or choose another folder (--out)")
    return path.exists()


def refuse_changed(path: Path, changed: list[str]) -> None:
    """Refuses a finished result that was made from something else.

    Args:
        path: the result.
        changed: names of what differs: "model", "text", fields of the config.

    Raises:
        FileExistsError: when anything differs.
    """
    if changed:
        raise FileExistsError(
            f"{path} was made with another model, text or config ({', '.join(changed)}); choose another folder (--out)"
        )


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with whole(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8; lone surrogates, which UTF-8 cannot encode, become `?`."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


_LINE = 120  # characters


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically, a flat list of numbers on one line; refuses NaN and infinities."""
    write_text(path, _layout(data, "") + "\n")


def _layout(value: Any, indent: str) -> str:
    """JSON text, with flat lists, and everything that fits into `_LINE` characters, on one line."""
    inner = indent + " "
    if isinstance(value, dict):
        names = (json.dumps({name: 0})[1:-1].removesuffix("0") for name in value)  # other keys become strings
        parts = [name + _layout(item, inner) for name, item in zip(names, value.values(), strict=True)]
        begin, end = "{}"
    elif isinstance(value, (list, tuple)):
        parts = [_layout(item, inner) for item in value]
        begin, end = "[]"
    else:
        return json.dumps(value, allow_nan=False)
    line = begin + ", ".join(parts) + end
    is_flat = isinstance(value, (list, tuple)) and not any(isinstance(item, (dict, list, tuple)) for item in value)
    if is_flat or (len(line) <= _LINE and "\n" not in line):
        return line
    return f"{begin}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{end}"


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[Callable[[], None]]:
    """Locks a folder, which it makes if needed, against other processes; the lock ends when this process dies.

    Temporary files that dead processes left in the folder are removed.

    Yields:
        A function that raises `FileNotFoundError` when the folder has been removed or replaced since. Call it before
        each write, because a write would make a new folder, which this process has not locked.

    Raises:
        FileExistsError: when another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is writing into {folder}; wait for it or end it") from error

        _remove_partials((*folder.glob(".*.partial"), *folder.glob("*/.*.partial")))
        yield _still(folder, handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Callable[[], None]]:
    """Yields what `only_process_in` does, in a process that writes on behalf of the one that has locked the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _still(folder, handle)
    finally:
        os.close(handle)


def _still(folder: Path, handle: int) -> Callable[[], None]:
    def still_held() -> None:
        if not folder.is_dir() or not os.path.samestat(folder.stat(), os.fstat(handle)):
            raise FileNotFoundError(f"{folder} was removed while it was written into; run it again")

    return still_held


def _remove_partials(partials: Iterable[Path]) -> None:
    """Removes the files among these that dead processes were writing."""
    for partial in partials:
        writer = partial.name.split(".")[-2]
        if writer.isdecimal() and (int(writer) == os.getpid() or not _is_alive(int(writer))):
            with contextlib.suppress(OSError):
                partial.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain data atomically."""
    import torch

    written = io.BytesIO()  # a full disk fails in Python, not in torch, whose error names neither cause nor file
    torch.save(state, written)
    write_bytes(path, written.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote; executes no code that the file may hold.

    Raises:
        DamagedFileError: when the file is truncated, altered, or not a checkpoint. Every byte is compared with its
        checksum, which `torch.load` does not do.
    """
    import torch

    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                altered = archive.testzip()
            if altered is not None:
                raise zipfile.BadZipFile(f"the checksum of {altered} does not fit")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # any error of zipfile, pickle or torch on invalid bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedFileError(
                f"{path} is damaged or not a checkpoint ({reason}); put a copy in its place, or remove it and run again"
            ) from error
    if not isinstance(state, dict):
        raise DamagedFileError(f"{path} holds a {type(state).__name__}, not a checkpoint; remove it and run again")
    return state
