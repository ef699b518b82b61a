"""The type of an experiment: rounds of runs, where a later round may depend on the records of an earlier one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from cramlab.training.run import RunConfig

# A study yields the runs of a round, is sent their records, and ends after the last round.
Study = Generator[list[RunConfig], list[dict[str, Any]], None]


class Experiment(Protocol):
    """A function that returns a study; `cramlab ls` shows the first line of its docstring."""

    def __call__(self, *, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
        """Returns the runs at one size of the task; None for seed or mixers: the experiment's own."""
        ...
