"""Kills: every command that writes is killed, again and again, and then has to finish with what it would have written.

A chain of kills hits one folder. Each is at a random moment, or at the n-th file that is written: while half of it is
there, before it gets its name, or right after. Then the command goes on undisturbed and its folder is compared.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.apart import Ended, apart
from faults.cases import Case, Fault, FaultFoundError, Measured
from faults.commands import WRITERS, Writer, content, contents, differences

KILLS_A_CHAIN, CHAINS = 8, 13  # 104 kills of every command
WHERE = ("moment", "moment", "half", "before", "after")
SECONDS = 120.0  # none of the commands takes so long


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """Chains for every command that writes."""
    for writer in WRITERS.values():
        for chain in range(max(1, round(share * CHAINS))):
            name = f"{writer.name}, chain {chain}"
            yield Case(f"kills of {writer.name}", name, functools.partial(_chain, writer, f"{seed} {name}"))


def _chain(writer: Writer, seed: str) -> Measured:
    """Kills and resumes until it has been killed often enough; then, and whenever it was faster, compares."""
    rng = random.Random(seed)
    seconds, n_writes = _undisturbed(writer)
    kills, out = 0, _with_notes(writer)
    while kills < KILLS_A_CHAIN:
        where, n = rng.choice(WHERE), rng.randint(1, max(1, n_writes))
        held = _finished_records(out)
        moment = rng.uniform(0.02, 1.0) * seconds if where == "moment" else SECONDS
        ended = apart(lambda out=out, where=where, n=n: _run(writer, out, where, n), seconds=moment)
        if ended.timed_out and where != "moment":
            raise FaultFoundError(Fault.HANG, f"no end after {SECONDS:g} s, killed {where} write {n}")
        if any(not path.exists() or content(path) != data for path, data in held.items()):
            raise FaultFoundError(Fault.LOST, f"a finished record changed in kill {kills}, {where} write {n}")
        if ended.killed:
            kills += 1
            continue
        _compare(writer, out, ended)
        out = _with_notes(writer)
    ended = apart(lambda: _run(writer, out, "moment", 0), seconds=SECONDS)
    if ended.timed_out:
        raise FaultFoundError(Fault.HANG, f"no end after {SECONDS:g} s when it went on")
    _compare(writer, out, ended)
    return {"tried": kills}


@functools.cache
def _undisturbed(writer: Writer) -> tuple[float, int]:
    """Seconds and files that an undisturbed call takes and writes."""
    assert writer.wanted  # made first, so that what others leave is there
    out = writer.fresh("counted")
    begin = time.monotonic()

    def counted() -> int:
        places = Places("count", 0)
        with places:
            writer.run(out)
        return places.n

    n = apart(counted, seconds=SECONDS).result()
    return time.monotonic() - begin, n


def _run(writer: Writer, out: Path, where: str, n: int) -> tuple[int, str]:
    """In the process that is to die: exit code and last words, should it live."""
    with Places(where, n):
        given = writer.run(out, resume=True)
    return given.code, given.err


class Places:
    """While open, this process dies at its n-th write: with half of the file on disk, before its renaming, or after.

    Files are written beside their place, synchronised and renamed; the system's own calls are what is watched, so that
    no way of writing escapes.
    """

    def __init__(self, where: str, n: int) -> None:
        self.where, self.at, self.n = where, n, 0

    def __enter__(self) -> None:
        self._fsync, self._replace, self._rename = os.fsync, os.replace, os.rename
        os.fsync, os.replace, os.rename = self.fsync, self._moved(os.replace), self._moved(os.rename)

    def __exit__(self, *_: object) -> None:
        os.fsync, os.replace, os.rename = self._fsync, self._replace, self._rename

    def fsync(self, handle: Any) -> None:
        """Called when a file is complete but has another name yet."""
        if self.where == "half" and self.n + 1 == self.at:
            number = handle if isinstance(handle, int) else handle.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        self._fsync(handle)

    def _moved(self, move: Callable[..., None]) -> Callable[..., None]:
        def moved(*args: Any, **kwargs: Any) -> None:
            self.n += 1
            if self.where == "before" and self.n == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            move(*args, **kwargs)
            if self.where == "after" and self.n == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

        return moved


def _with_notes(writer: Writer) -> Path:
    """A place to write to, beside (or in) which something of the user's lies."""
    out = writer.fresh("killed")
    _notes(writer, out).parent.mkdir(parents=True, exist_ok=True)
    _notes(writer, out).write_text("mine\n", encoding="utf-8")
    return out


def _notes(writer: Writer, out: Path) -> Path:
    # An audit of checkpoints is refused in a folder that holds anything, unless it goes on there.
    return (out.parent if writer.file else out) / "my-notes.txt"


def _finished_records(out: Path) -> dict[Path, Any]:
    """Documents that say of themselves that work is finished; no kill may change one."""
    names = ("record.json", "audit.json", "consolidation.json", "irregular.json", "over_training.json", "step.json")
    found = (path for name in names for path in out.rglob(name)) if out.is_dir() else ()
    return {path: content(path) for path in found if not path.parent.name.endswith(".partial")}  # not in place yet


def _compare(writer: Writer, out: Path, ended: Ended[tuple[int, str]]) -> None:
    """Raises unless a call that went on to its end has left what an undisturbed one leaves, and the user's notes."""
    code, said = ended.result()
    if code:
        raise FaultFoundError(Fault.TRACEBACK, f"going on failed: {' / '.join(said.strip().splitlines()[-2:])[:240]}")
    notes = _notes(writer, out)
    if not notes.is_file() or notes.read_text(encoding="utf-8") != "mine\n":
        raise FaultFoundError(Fault.LOST, "the user's notes are gone")
    notes.unlink()
    found = contents(out)
    beside = {path.name for path in out.parent.iterdir()} - {out.name} if writer.file else set()
    if left := sorted({*beside, *(found.keys() - writer.wanted.keys())}):
        raise FaultFoundError(Fault.LEFTOVER, ", ".join(left)[:200])
    if different := differences(found, writer.wanted):
        raise FaultFoundError(Fault.WRONG, f"differs from an undisturbed call in {', '.join(different)[:200]}")
