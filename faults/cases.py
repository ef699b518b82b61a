"""A case is one test; its verdict says whether the library passed, and if not, which fault it showed."""

from __future__ import annotations

import contextlib
import enum
import io
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from faults.apart import Ended, apart

Measured = Mapping[str, Any]


class Fault(enum.StrEnum):
    """Kinds of faults; the first four must never happen."""

    WRONG = "silent wrong result"
    TRACEBACK = "traceback"
    HANG = "hang"
    ACCEPTED = "harmful input accepted"
    UNCLEAR = "refused without one clear line"
    LEFTOVER = "file left behind"
    LOST = "user's file lost"


class FaultFoundError(Exception):
    """Raised by a check that has found a fault."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(fault, message)
        self.fault, self.message = fault, message


class RefusedError(Exception):
    """Raised by a check of a computation that the library has refused in a documented way, which passes."""


class NotHereError(Exception):
    """Raised by a check that is impossible on this machine; it counts as not tried."""


@dataclass(frozen=True)
class Case:
    """One test.

    Attributes:
        test: the row of the table that it belongs to.
        name: unique in its part; with the seed it is enough to run the case again.
        check: returns what it has measured, if anything, and raises `FaultFoundError` otherwise. "tried" among the
            measured values says how many tries the case stands for; without it, one.
        apart: whether it needs a process of its own, because it may crash, change or block the process.
    """

    test: str
    name: str
    check: Callable[[], Measured | None]
    apart: bool = False


@dataclass(frozen=True)
class Verdict:
    """The result of a case.

    Attributes:
        test: as in the case.
        name: as in the case.
        fault: None where the library passed.
        message: what was seen.
        refused: whether the library passed by refusing.
        measured: as returned by the check.
    """

    test: str
    name: str
    fault: Fault | None = None
    message: str = ""
    refused: bool = False
    measured: Measured = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """Number of tries that the case stands for."""
        return self.measured.get("tried", 1)


class _TimeOutError(BaseException):
    """The alarm; no `except Exception` of the tried code may catch it."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Interrupts its block after `seconds`."""

    def ring(*_: object) -> None:
        raise _TimeOutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case, seconds: float = 60.0) -> Verdict:
    """Runs a case for at most `seconds`, in a process of its own if it asks for one."""
    if not case.apart:
        return _judge(case, seconds)
    ended: Ended[Verdict] = apart(lambda: _judge(case, seconds), seconds=seconds + 10)
    if ended.error is not None:
        return Verdict(case.test, case.name, Fault.TRACEBACK, described(ended.error))
    if ended.value is not None:
        return ended.value
    if ended.timed_out:
        return Verdict(case.test, case.name, Fault.HANG, f"no end after {seconds + 10:g} s")
    return Verdict(case.test, case.name, Fault.TRACEBACK, f"the process ended with {ended.how}")


def _judge(case: Case, seconds: float) -> Verdict:
    try:
        with alarm(seconds):
            measured = case.check() or {}
    except FaultFoundError as found:
        return Verdict(case.test, case.name, found.fault, found.message)
    except RefusedError as refusal:
        return Verdict(case.test, case.name, None, str(refusal), refused=True)
    except NotHereError as reason:
        return Verdict(case.test, case.name, None, str(reason), measured={"tried": 0})
    except _TimeOutError:
        return Verdict(case.test, case.name, Fault.HANG, f"no end after {seconds:g} s")
    except Exception as error:
        return Verdict(case.test, case.name, Fault.TRACEBACK, described(error))
    return Verdict(case.test, case.name, measured=measured)


def described(error: BaseException) -> str:
    """Type, message (first 200 characters) and innermost line of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:200]}"


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def answer(call: Callable[[], int | None]) -> Answer:
    """Calls a command with its output captured; an exception that reaches the user is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = call() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception as error:
            raise FaultFoundError(Fault.TRACEBACK, described(error)) from error
    return Answer(code, out.getvalue(), err.getvalue())


def check_refusal(given: Answer, names: Sequence[str] = ()) -> None:
    """Raises unless a command has refused with one line that says why, as the last that it printed.

    Args:
        given: exit code and output of the command.
        names: words of which the line must hold at least one, such as the field or file at fault.
    """
    if given.code == 0:
        raise FaultFoundError(Fault.ACCEPTED, f"exit code 0; printed {given.out.strip()[-160:]!r}")
    lines = given.err.strip().splitlines()
    if "Traceback (most recent call last)" in given.err:
        raise FaultFoundError(Fault.TRACEBACK, lines[-1][:240])
    if given.code not in (1, 2) or not lines or not lines[-1].startswith("cramlab"):
        raise FaultFoundError(Fault.UNCLEAR, f"exit code {given.code}, ends with {' / '.join(lines[-2:])[:240]!r}")
    if names and not any(name in lines[-1] for name in names):
        raise FaultFoundError(Fault.UNCLEAR, f"none of {', '.join(names)} is named in {lines[-1][:240]!r}")
