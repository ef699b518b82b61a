"""Starts the ranks of a run, one process for each device of this machine, and ends them all when one is lost."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cramlab.errors import CramlabError
from cramlab.extensions import load_classes, loaded_classes
from cramlab.ranks import Ranks

_GRACE_S = 5.0  # for the other ranks to end by themselves after one has failed


class LostRankError(CramlabError, RuntimeError):
    """A process of a run on several devices was killed; the others have been ended."""


def launch(
    body: Callable[..., None],
    given: Mapping[str, Any],
    *,
    n_ranks: int,
    name: str,
    on_message: Callable[[Any], None] | None,
) -> None:
    """Calls `body(ranks, send, **given)` in `n_ranks` new processes that form a process group, and waits for them.

    Sums go through gloo on the CPU and NCCL between CUDA devices; rank i has the CUDA device i, if there is one.

    Args:
        body: a function of a module; `send` passes a message to this process.
        given: its arguments, which can be pickled.
        n_ranks: number of processes.
        name: name of the run, for messages.
        on_message: called in this process with each message; None: messages are dropped.

    Raises:
        LostRankError: when a process is killed.
        Exception: the error that a rank raised first.
    """
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, n_ranks, is_master=True, wait_for_workers=False)
    jobs: dict[Any, BaseProcess] = {}  # by the end of the pipe from which it is heard
    try:
        for rank in range(n_ranks):
            ours, theirs = context.Pipe(duplex=False)
            what = pickle.dumps((body, dict(given)))  # read once the classes are loaded
            about = (Ranks(rank, n_ranks), store.port, theirs, what, os.getpid(), loaded_classes())
            jobs[ours] = context.Process(target=_rank, args=about, name=f"rank {rank} of {n_ranks}", daemon=True)
            jobs[ours].start()
            theirs.close()
        _listen(jobs, name, on_message)
    finally:
        for job in jobs.values():
            job.kill()
            job.join()


def _listen(jobs: dict[Any, BaseProcess], name: str, on_message: Callable[[Any], None] | None) -> None:
    """Passes messages on until all ranks have ended; raises once one has failed."""
    failure: Exception | None = None
    open_, until = set(jobs), float("inf")
    while open_ and time.monotonic() < until:
        for connection in cast("list[Connection]", wait(open_, timeout=0.5)):
            try:
                kind, payload = connection.recv()
            except EOFError:  # the process has ended
                open_.remove(connection)
                jobs[connection].join()
                if jobs[connection].exitcode and until == float("inf"):
                    until = time.monotonic() + _GRACE_S
                continue
            if kind == "failed":
                failure = failure or payload
            elif on_message is not None:
                on_message(payload)
    for job in jobs.values():
        if job.exitcode is not None and job.exitcode < 0:
            raise LostRankError(
                f"{name}: {job.name} was ended by signal {-job.exitcode}, so the others were ended too; continue with "
                "--resume"
            )
    if failure is not None:
        raise failure
    for job in jobs.values():
        if job.exitcode:
            raise LostRankError(f"{name}: {job.name} ended with exit code {job.exitcode}; continue with --resume")


def _rank(ranks: Ranks, port: int, messages: Connection, what: bytes, parent: int, classes: list[str]) -> None:
    """The body of a rank's process."""
    follow(parent)
    try:
        load_classes(classes)
        body, given = pickle.loads(what)
        if torch.cuda.is_available() and ranks.index < torch.cuda.device_count():
            torch.cuda.set_device(ranks.index)
        store = TCPStore("127.0.0.1", port, ranks.n, is_master=False, timeout=timedelta(minutes=5))
        dist.init_process_group(_backend(), store=store, rank=ranks.index, world_size=ranks.n)
        body(ranks, lambda message: messages.send(("message", message)), **given)
        dist.destroy_process_group()
    except Exception as error:
        messages.send(("failed", _picklable(error)))
        os._exit(1)  # without waiting for the other ranks


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _picklable(error: Exception) -> Exception:
    """The error itself, or its text in an error that every process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some errors cannot be made again from their message
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def follow(parent: int) -> None:
    """Leaves Ctrl-C to the parent, and ends this process when the parent has been killed: no run goes on unseen."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
