"""Experiments: functions that return the runs behind a table or figure."""

from __future__ import annotations

from typing import Protocol

from cramlab.experiments.srcd import srcd, srcd_routers
from cramlab.training.run import RunConfig


class Experiment(Protocol):
    """Returns its runs; the docstring's first line is what `cramlab ls` shows."""

    def __call__(self, *, size: str, seed: int) -> list[RunConfig]:
        """The runs of this experiment."""
        ...


EXPERIMENTS: dict[str, Experiment] = {"srcd": srcd, "srcd_routers": srcd_routers}
__all__ = ["EXPERIMENTS", "Experiment"]
