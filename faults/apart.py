"""Runs functions in forked processes, so that a test costs no import."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ended(Generic[Value]):
    """How a process ended.

    Attributes:
        value: what the function returned; None where the process ended without returning.
        error: what the function raised; None where it returned or the process ended otherwise.
        status: of the process, as `os.waitpid` gives it.
        timed_out: whether it was ended because its time was up.
        seconds: until it ended.
    """

    value: Value | None
    error: Exception | None
    status: int
    timed_out: bool
    seconds: float

    def result(self) -> Value:
        """What the function returned; raises what it raised, or a RuntimeError that says how the process ended."""
        if self.error is not None:
            raise self.error
        if self.value is None:
            raise RuntimeError(f"the process ended with {'its time up' if self.timed_out else self.how}")
        return self.value

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    @property
    def how(self) -> str:
        """Exit code or signal, in words."""
        if os.WIFSIGNALED(self.status):
            return f"signal {os.WTERMSIG(self.status)}"
        return f"exit code {os.waitstatus_to_exitcode(self.status)}"


def apart(function: Callable[[], Value], *, seconds: float) -> Ended[Value]:
    """Calls a function in a forked process, which is killed after `seconds`.

    The calling process must have one thread only. The function may change anything in memory without effect on the
    caller. It must return a value other than None; this, or the error that it raises, must be picklable.
    """
    begin = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setpgid(0, 0)  # its own children end with it
        try:
            with os.fdopen(writing, "wb") as pipe:
                try:
                    sent = pickle.dumps((function(), None))
                except Exception as error:
                    sent = pickle.dumps((None, error))
                pipe.write(sent)
        except BaseException:
            os._exit(70)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent, timed_out = _all_of(pipe.fileno(), begin + seconds)
    if timed_out:
        for kill in (os.killpg, os.kill):  # its group, and itself if it has had no time yet to make one
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    value, error = pickle.loads(sent) if sent and status == 0 else (None, None)
    return Ended(value, error, status, timed_out, time.monotonic() - begin)


def _all_of(pipe: int, end: float) -> tuple[bytes, bool]:
    """Bytes of a pipe until it is closed, and whether the time ran out before."""
    parts = []
    while (left := end - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            if not (part := os.read(pipe, 1 << 16)):
                return b"".join(parts), False
            parts.append(part)
    return b"".join(parts), True
