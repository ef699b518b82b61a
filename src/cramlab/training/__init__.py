"""Training on the benchmark task: a run's config, loop, schedule, evaluation and files."""

from cramlab.training.loop import RunFailedError, train
from cramlab.training.run import RunConfig, Stage, TrainingConfig

__all__ = ["RunConfig", "RunFailedError", "Stage", "TrainingConfig", "train"]
