"""Full disks: every command that writes, with a limit on the size of files, or on a disk that is almost full."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.apart import Ended, apart
from faults.cases import Answer, Case, Fault, FaultFoundError, NotHereError, check_refusal
from faults.commands import WRITERS, Writer, contents, differences
from faults.material import fresh

SECONDS = 120.0
LIMITS = (0, 100, 4096, 16_384, 65_536)  # bytes that a file may hold
SHARES = (0.3, 0.9, 0.999)  # of the longest file that the command writes


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:  # noqa: ARG001
    """Each command at several limits of a file's size, and on small disks of their own where they can be made."""
    for writer in list(WRITERS.values())[: max(1, round(share * len(WRITERS)))]:
        for limit in LIMITS[:: 1 if share == 1 else 2]:
            name = f"{writer.name}, files of {limit} bytes at most"
            yield Case(f"full disk: {writer.name}", name, functools.partial(_limited, writer, limit, None))
        for part in SHARES[:: 1 if share == 1 else 2]:
            name = f"{writer.name}, files of {part:.1%} of its longest"
            yield Case(f"full disk: {writer.name}", name, functools.partial(_limited, writer, None, part))
        for part in SHARES if share == 1 else ():
            name = f"{writer.name}, a disk of {part:.1%} of what it writes"
            yield Case(f"full disk: {writer.name}", name, functools.partial(_small_disk, writer, part))


def _sizes(writer: Writer) -> list[int]:
    finished = writer.finished
    return [p.stat().st_size for p in ([finished] if finished.is_file() else finished.rglob("*")) if p.is_file()]


def _limited(writer: Writer, limit: int | None, part: float | None) -> None:
    """Runs a command under a limit of a file's size."""
    most = int(max(_sizes(writer)) * part) if part is not None else limit
    assert most is not None
    assert writer.wanted  # made before the disk is full
    out = writer.fresh("full")

    def work() -> Answer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return writer.run(out)

    _judge(writer, out, apart(work, seconds=SECONDS), fits=most >= max(_sizes(writer)))


def _small_disk(writer: Writer, part: float) -> None:
    """Runs a command on a file system that holds less than the command writes."""
    assert writer.wanted
    place = fresh("disk")
    place.mkdir()
    size = max(4096, int(sum(_sizes(writer)) * part))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "cramlab-faults", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise NotHereError("only the superuser can make a small disk, and not everywhere")
    try:
        out = place / (writer.file or "out")
        given = apart(lambda: writer.run(out), seconds=SECONDS)
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        _judge(writer, out, given, fits=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def _judge(writer: Writer, out: Path, ended: Ended[Answer], *, fits: bool) -> None:
    """Checks for one line and nothing half written; then, with room, for the whole result."""
    given = ended.result()
    if given.code or not fits:
        check_refusal(given)
    if given.code:
        left = [path.name for path in out.parent.rglob("*") if "partial" in path.name or path.suffix == ".tmp"]
        if left:
            raise FaultFoundError(Fault.LEFTOVER, ", ".join(left)[:200])
    later = apart(lambda: writer.run(out, resume=True), seconds=SECONDS).result()
    if later.code:
        raise FaultFoundError(Fault.TRACEBACK, f"it does not continue when there is room: {later.err.strip()[-200:]}")
    if different := differences(contents(out), writer.wanted):
        raise FaultFoundError(Fault.WRONG, f"differs from an undisturbed call in {', '.join(different)[:200]}")
