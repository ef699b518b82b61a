"""What an experiment is: rounds of runs, where a later round may depend on the records of an earlier one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from cramlab.training.run import RunConfig

# Yields the runs of a round, is sent their records, and ends when there is no further round.
Study = Generator[list[RunConfig], list[dict[str, Any]], None]


class Experiment(Protocol):
    """Returns a study; the docstring's first line is what `cramlab ls` shows."""

    def __call__(self, *, size: str, seed: int | None, mixers: Sequence[str] | None) -> Study:
        """The runs at one size of the task; with None for them, the experiment's own seeds and mixers."""
        ...
