"""Trains several runs in parallel, one process and one core each."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.config import ConfigError
from cramlab.extensions import load_classes, loaded_classes
from cramlab.files import DamagedFileError
from cramlab.launch import follow
from cramlab.tasks.check import check_own_task
from cramlab.training.folder import RECORD, refuse_to_overwrite
from cramlab.training.loop import RunFailedError, train
from cramlab.training.machine import check_accelerator, check_model
from cramlab.training.progress import OnRow
from cramlab.training.run import RunConfig


def run_jobs(
    configs: list[RunConfig], out: Path, *, resume: bool, n_jobs: int, progress: OnRow | None = None
) -> list[dict[str, Any]]:
    """Trains every config into `out/NAME`, at most `n_jobs` at a time. A run waits for the run that it starts from.

    Args:
        configs: runs with different names.
        out: folder that holds the runs' folders.
        resume: continue interrupted runs and skip finished ones.
        n_jobs: number of processes at a time; a single run is trained in this process.
        progress: called in this process with each new row of each run.

    Returns:
        The records, in the order of the configs.

    Raises:
        RunFailedError: when any run failed; the others have been finished first.
        FileExistsError: when a folder holds another run; no run has been started.
        ConfigError: when this machine cannot train one of the runs; no run has been started.
    """
    check_jobs(configs, out, resume=resume)
    for config in configs:
        check_accelerator(config.training)
    if len(configs) == 1:
        return [train(configs[0], out / configs[0].name, resume=resume, progress=progress)]
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    waiting = list(configs)
    running: dict[str, BaseProcess] = {}
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while len(running) < n_jobs and (config := next_job(waiting, running)) is not None:
                job = context.Process(
                    target=_job,
                    args=(config, out / config.name, resume, events, os.getpid(), loaded_classes()),
                    daemon=config.training.devices == 1,  # only others may start processes
                )
                job.start()
                running[config.name] = job
            try:
                kind, name, payload = events.get(timeout=0.5)
            except queue.Empty:
                _notice_deaths(running, failures)
                continue
            if kind == "row" and progress is not None:
                progress(payload)
            elif kind == "failed":
                failures[name] = payload
            if kind in ("failed", "finished"):
                running.pop(name).join()
    finally:
        for job in running.values():
            job.terminate()
    if failures:
        raise RunFailedError("; ".join(f"{name}: {message}" for name, message in failures.items()))
    return [records.read(out / config.name / RECORD) for config in configs]


def check_jobs(configs: list[RunConfig], out: Path, *, resume: bool) -> None:
    """Raises unless every config can be trained and its folder is free or its own."""
    names = [config.name for config in configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two runs would share the folder {twice[0]}; name each mixer once")
    for config in configs:
        check_model(config)
        check_own_task(config.task, seed=config.seed)
        refuse_to_overwrite(config, out / config.name, resume=resume)


def next_job(waiting: list[RunConfig], running: Iterable[str]) -> RunConfig | None:
    """Removes from `waiting` and returns the first run whose predecessor neither waits nor runs; None if there is none.

    A run whose predecessor failed or was not requested is started too; it raises an error that names what is missing.
    """
    running = set(running)
    unfinished = running | {config.name for config in waiting}
    ready = (i for i, config in enumerate(waiting) if config.after not in unfinished)
    i = next(ready, None if running or not waiting else 0)
    return None if i is None else waiting.pop(i)


def _notice_deaths(running: dict[str, BaseProcess], failures: dict[str, str]) -> None:
    """Finds processes that ended without a message, such as killed ones."""
    for name, job in list(running.items()):
        if job.exitcode not in (None, 0):
            failures[name] = f"its process ended with exit code {job.exitcode}; continue with --resume"
            running.pop(name)


def _job(config: RunConfig, out: Path, resume: bool, events: Any, parent: int, classes: list[str]) -> None:
    """The body of a child process. `classes` are the references of all loaded classes; records name them so."""
    follow(parent)
    try:
        load_classes(classes)
        train(config, out, resume=resume, progress=lambda row: events.put(("row", config.name, row)))
    except (RunFailedError, DamagedFileError, OSError) as error:
        events.put(("failed", config.name, str(error)))
    except Exception as error:  # the parent must learn of any error
        events.put(("failed", config.name, f"{type(error).__name__}: {error}"))
    else:
        events.put(("finished", config.name, None))
