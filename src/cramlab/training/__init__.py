"""Training: what a run is, its loop, its evaluation, its files."""

from cramlab.training.loop import RunFailedError, train
from cramlab.training.run import RunConfig, Stage, TrainingConfig

__all__ = ["RunConfig", "RunFailedError", "Stage", "TrainingConfig", "train"]
