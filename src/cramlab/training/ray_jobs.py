"""Trains several runs on a Ray cluster. Needs the extra `cramlab[ray]`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.config import ConfigError
from cramlab.training.folder import RECORD
from cramlab.training.jobs import check_jobs, next_job
from cramlab.training.loop import RunFailedError, train
from cramlab.training.progress import OnRow
from cramlab.training.run import RunConfig


def run_jobs_on_ray(
    configs: list[RunConfig], out: Path, *, resume: bool, n_jobs: int, progress: OnRow | None = None
) -> list[dict[str, Any]]:
    """Trains every config into `out/NAME`, as a Ray task with one CPU each; otherwise like `jobs.run_jobs`.

    Uses the connected cluster, or the one that `RAY_ADDRESS` names, or starts one on this machine with `n_jobs` CPUs.
    All machines must see the folder `out` under the same path. At most `n_jobs` runs are trained at a time.

    Raises:
        RunFailedError: when a run failed or its machine was lost; the others have been finished first.
        FileExistsError: when a folder holds another run; no run has been started.
        ConfigError: when Ray is not installed, or a run cannot be trained; no run has been started.
    """
    try:
        import ray
        from ray.util.queue import Queue
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray; install it with: pip install cramlab[ray]") from error
    check_jobs(configs, out, resume=resume)
    if not ray.is_initialized():
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            ray.init(num_cpus=n_jobs, include_dashboard=False, log_to_driver=False)
    rows = Queue(actor_options={"num_cpus": 0})
    task = ray.remote(num_cpus=1, max_retries=0)(_train_remotely)
    waiting = list(configs)
    running: dict[Any, str] = {}
    failures: dict[str, str] = {}
    while waiting or running:
        while len(running) < n_jobs and (config := next_job(waiting, running.values())) is not None:
            running[task.remote(config, (out / config.name).absolute(), resume, rows)] = config.name
        done, _ = ray.wait(list(running), timeout=0.5)
        while not rows.empty():
            row = rows.get()
            if progress is not None:
                progress(row)
        for reference in done:
            name = running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # the other runs go on after any error
                cause = getattr(error, "cause", None) or error
                failures[name] = f"{type(cause).__name__}: {cause}"
    rows.shutdown()
    if failures:
        raise RunFailedError("; ".join(f"{name}: {message}" for name, message in failures.items()))
    return [records.read(out / config.name / RECORD) for config in configs]


def _train_remotely(config: RunConfig, out: Path, resume: bool, rows: Any) -> None:
    """The body of a Ray task."""
    train(config, out, resume=resume, progress=rows.put)
