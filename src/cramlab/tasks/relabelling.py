"""SRCD with relabelled answers: the bindings are the same, and one fixed permutation renames every answer.

Inputs, written values included, are SRCD's; the answer to a query is `renaming[value]`. A model that has memorised the
bindings has only the renaming to learn.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from cramlab.batch import Batch
from cramlab.config import checked
from cramlab.tasks.srcd import SRCDConfig
from cramlab.tasks.task import Split

_STREAM = 204  # spawn key of the generator that draws the permutation


@checked("task")
class RelabellingConfig(SRCDConfig):
    """The fields are SRCD's; the renaming is the same for all seeds and lengths."""

    def draw(self, indices: range, *, seed: int, split: Split) -> Batch:
        """Returns the sequences with these indices of a split as one batch."""
        batch = super().draw(indices, seed=seed, split=split)
        names = torch.from_numpy(renaming(self.n_values))
        renamed = torch.where(batch.retrieval_mask, names[batch.retrieval_target], batch.retrieval_target)
        return batch._replace(retrieval_target=renamed)


@functools.lru_cache(maxsize=4)
def renaming(n_values: int) -> np.ndarray:
    """Returns the new name of each value, (n_values,): a cyclic permutation, so no value keeps its name."""
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_STREAM,))).permutation(n_values)
    names = np.empty(n_values, dtype=np.int64)
    names[order] = np.roll(order, 1)
    return names
