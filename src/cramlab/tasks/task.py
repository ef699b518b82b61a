"""The contract of a task: what training and evaluation ask of a task's config, and the stream of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from cramlab.batch import Batch, InputSpec

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass whose fields all have defaults and which draws its data from a seed. It knows no model.

    Two methods are optional: `oracle(batch)` and `floor(batch)` return the `Predictions` of whoever knows the law that
    generates the data, and of a trivial guess; see `cramlab.tasks.check.reference_scores`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seq_len(self) -> int:
        """Tokens per sequence: a field, which training replaces to train and test at several lengths."""
        ...

    @property
    def n_patterns(self) -> int:
        """Number of recurring patterns that `Batch.pattern` refers to, at least 1; -1 in `Batch.pattern` is none."""
        ...

    @property
    def input_spec(self) -> InputSpec:
        """Shape of inputs and answers, from which a model is built."""
        ...

    @property
    def dynamics_floor(self) -> float:
        """Lowest mean squared error that any model can reach on the next level; 0 where there are no levels."""
        ...

    @property
    def expected_attention_frac(self) -> float:
        """Expected share of tokens that must attend: those that `Batch.oracle_reads` marks."""
        ...

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices as one batch: a function of its arguments alone.

        Sequences of different splits must not share what a model could memorise from one for the other.
        """
        ...

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> BatchStream:
        """Returns the endless stream of batches, `BatchStream(self, ...)`."""
        ...


class BatchStream(IterableDataset[Batch]):
    """An endless, restartable stream of batches of one split.

    The batch at `index` holds the sequences `index` to `index + batch_size - 1`, whatever was drawn before.

    Args:
        task: the task's config.
        seed: seed of the data.
        split: "train", "validation" or "test".
        batch_size: sequences per batch.
        start: index of the first sequence.

    Raises:
        ValueError: when the split is unknown, or seed, batch size or start is out of range.
    """

    def __init__(self, task: Task, *, seed: int, split: Split, batch_size: int, start: int = 0) -> None:
        super().__init__()
        check_stream(split, seed=seed, start=start, batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        self.task, self.seed, self.batch_size, self.start = task, seed, batch_size, start
        self.split: Split = split

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end."""
        worker = get_worker_info()  # the workers of a DataLoader take turns
        index = self.start + (worker.id * self.batch_size if worker else 0)
        while True:
            yield self.batch(index)
            index += self.batch_size * (worker.num_workers if worker else 1)

    def batch(self, index: int) -> Batch:
        """Returns the batch whose first sequence has this index in the split."""
        return self.task.draw(range(index, index + self.batch_size), seed=self.seed, split=self.split)


def check_stream(split: str, **numbers: int) -> None:
    """Checks the name of a split and the numbers that select its data, such as seed and index.

    Raises:
        ValueError: when the split is unknown or a number is not a whole number from 0; names argument, value and fix.
    """
    if split not in SPLITS:
        raise ValueError(f'split "{split}" is unknown; give one of {", ".join(SPLITS)}')
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise ValueError(f"{name} = {number!r} must be a whole number from 0")
