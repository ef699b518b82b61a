"""Trains several runs on a Ray cluster. Needs the extra `cramlab[ray]`."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.config import ConfigError
from cramlab.extensions import load_classes, loaded_classes
from cramlab.training.folder import RECORD
from cramlab.training.jobs import check_jobs, next_job
from cramlab.training.loop import RunFailedError, train
from cramlab.training.progress import OnRow
from cramlab.training.run import RunConfig

MOST_LOSSES = 3  # times that a run whose machine was lost is continued on another one


def run_jobs_on_ray(
    configs: list[RunConfig], out: Path, *, resume: bool, n_jobs: int, progress: OnRow | None = None
) -> list[dict[str, Any]]:
    """Trains every config into `out/NAME`, as a Ray task with one CPU each; otherwise like `jobs.run_jobs`.

    Uses the connected cluster, or the one that `RAY_ADDRESS` names, or starts one on this machine with `n_jobs` CPUs.
    All machines must see `out`, and files with tasks and mixers of one's own, under the same paths. At most `n_jobs`
    runs are trained at a time; with `training.accelerator = "cuda"` they share the cluster's GPUs in equal parts
    (`gpus_of_a_run`). A run whose machine is lost continues from its checkpoint on another machine.

    Raises:
        RunFailedError: when a run failed, or lost its machine more than `MOST_LOSSES` times; the others have been
            finished first.
        FileExistsError: when a folder holds another run; no run has been started.
        ConfigError: when Ray is not installed, a run cannot be trained, or the cluster has no GPU for a run that needs
            one; no run has been started.
    """
    try:
        import ray
        from ray.exceptions import NodeDiedError, WorkerCrashedError
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray; install it with: pip install cramlab[ray]") from error
    check_jobs(configs, out, resume=resume)
    if not ray.is_initialized():
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            ray.init(num_cpus=n_jobs, include_dashboard=False, log_to_driver=False)
    n_gpus = ray.cluster_resources().get("GPU", 0.0)
    shares = {config.name: gpus_of_a_run(config, n_jobs, n_gpus) for config in configs}
    # The queue must outlive every machine but this one.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rows = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    task = ray.remote(num_cpus=1, max_retries=0)(_train_remotely)
    waiting = list(configs)
    running: dict[Any, RunConfig] = {}
    losses: dict[str, int] = {}
    failures: dict[str, str] = {}
    while waiting or running:
        names = [config.name for config in running.values()]
        while len(running) < n_jobs and (config := next_job(waiting, names)) is not None:
            again = resume or config.name in losses
            started = task.options(num_gpus=shares[config.name]).remote(
                pickle.dumps(config), (out / config.name).absolute(), again, rows, loaded_classes(), Path.cwd()
            )
            running[started] = config
            names.append(config.name)
        done, _ = ray.wait(list(running), timeout=0.5)
        while not rows.empty():
            row = rows.get()
            if progress is not None:
                progress(row)
        for reference in done:
            config = running.pop(reference)
            try:
                ray.get(reference)
            except (NodeDiedError, WorkerCrashedError) as error:
                losses[config.name] = losses.get(config.name, 0) + 1
                if losses[config.name] <= MOST_LOSSES:
                    waiting.insert(0, config)
                else:
                    failures[config.name] = f"its machine was lost {losses[config.name]} times: {error}"
            except Exception as error:  # the other runs go on after any error
                cause = getattr(error, "cause", None) or error
                failures[config.name] = f"{type(cause).__name__}: {cause}"
    rows.shutdown()
    if failures:
        raise RunFailedError("; ".join(f"{name}: {message}" for name, message in failures.items()))
    return [records.read(out / config.name / RECORD) for config in configs]


def gpus_of_a_run(config: RunConfig, n_jobs: int, n_gpus: float) -> float:
    """The part of a GPU that a run reserves: one, or 1/k where k runs must share each of the cluster's GPUs.

    Args:
        config: the run; it needs no GPU unless `training.accelerator` is "cuda".
        n_jobs: runs at a time.
        n_gpus: GPUs of the cluster.

    Raises:
        ConfigError: when the run needs a GPU and the cluster has none, so that it would wait for ever.
    """
    if config.training.accelerator != "cuda":
        return 0.0
    if n_gpus < 1:
        raise ConfigError(
            f'training.accelerator = "cuda" in {config.name}, and the Ray cluster has no GPU; start its nodes with '
            '`ray start --num-gpus N`, or set training.accelerator="cpu"'
        )
    return 1 / math.ceil(n_jobs / n_gpus)


def _train_remotely(config: bytes, out: Path, resume: bool, rows: Any, classes: list[str], folder: Path) -> None:
    """The body of a Ray task.

    Args:
        config: the pickled run, which can be read once the classes are loaded.
        out: folder of the run.
        resume: continue from its checkpoint.
        rows: queue of the rows of the series.
        classes: references of all loaded classes; records name them so.
        folder: the caller's working directory, which references to files start from.
    """
    if classes:
        os.chdir(folder)
    load_classes(classes)
    train(pickle.loads(config), out, resume=resume, progress=rows.put)
