"""The `cramlab` command: run, eval, cost, report, score, audit, irregular, consolidate, try, ls, show.

Parsing imports nothing heavy: each handler checks its arguments first, and then imports what does the work.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from cramlab.cli.audit import add_audit
from cramlab.cli.compare import add_try
from cramlab.cli.consolidate import add_consolidate
from cramlab.cli.irregular import add_irregular
from cramlab.cli.results import add_cost, add_eval, add_report
from cramlab.cli.run import add_ls, add_run, add_show
from cramlab.cli.score import add_score
from cramlab.errors import CramlabError
from cramlab.terminal import plain


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 (failed, or ended by Ctrl-C or SIGTERM) or 2 (bad usage)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be valid text
    args = None
    try:
        with _ending_like_ctrl_c():
            args = _parser().parse_args(argv)
            args.command(args)
            sys.stdout.flush()
    except CramlabError as error:
        return _said(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the final flush would fail again
    except OSError as error:
        return _said(str(error), CramlabError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _said(f"out of memory ({error}); smaller sizes need less", CramlabError.exit_code)
    except KeyboardInterrupt:
        can_resume = hasattr(args, "resume")
        return _said("interrupted" + "; the same command with --resume continues" * can_resume, CramlabError.exit_code)
    return 0


def _said(message: str, code: int) -> int:
    """Prints why a command ends, in one line."""
    print(f"cramlab: {plain(' '.join(message.splitlines()))}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is Python's or torch's for a lack of memory."""
    return isinstance(error, (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)))


@contextlib.contextmanager
def _ending_like_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM end the command as Ctrl-C does: files stay whole, and child processes end too."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Version(argparse.Action):
    """Prints the version, which is read from the installed package only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"cramlab {importlib.metadata.version('cramlab')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cramlab",
        description="How much of a model's attention is really needed, and can it learn to need less?",
        epilog="start with: cramlab run srcd --size small --seed 0 --out runs/first",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        add_run, add_eval, add_cost, add_report, add_score, add_audit, add_irregular, add_consolidate, add_try, add_ls,
        add_show,
    ):  # fmt: skip
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
