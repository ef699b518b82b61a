"""SRCD whose answers go by other names: the same bindings, every value renamed by one fixed permutation.

Inputs are SRCD's own, values written included; what is asked for is `rename[value]`. Who knows the bindings by heart
has only the names to learn.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from cramlab.batch import Batch
from cramlab.config import checked
from cramlab.tasks.srcd import Split, SRCDConfig, SRCDDataset

_STREAM = 204  # spawn key of the permutation


@checked("task")
class RelabellingConfig(SRCDConfig):
    """SRCD's fields; the new names are the same for all seeds and lengths."""

    def dataset(self, *, seed: int, split: Split, batch_size: int, start: int = 0) -> RelabellingDataset:
        """See `SRCDConfig.dataset`."""
        return RelabellingDataset(self, seed=seed, split=split, batch_size=batch_size, start=start)


@functools.lru_cache(maxsize=4)
def renaming(n_values: int) -> np.ndarray:
    """The new name of each value, (n_values,): a cyclic permutation, so that none keeps its own."""
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_STREAM,))).permutation(n_values)
    names = np.empty(n_values, dtype=np.int64)
    names[order] = np.roll(order, 1)
    return names


class RelabellingDataset(SRCDDataset):
    """An endless, restartable stream of batches; see `SRCDDataset`."""

    def batch(self, index: int) -> Batch:
        """The batch whose first sequence is number `index` of the split."""
        batch = super().batch(index)
        names = torch.from_numpy(renaming(self.config.n_values))
        renamed = torch.where(batch.retrieval_mask, names[batch.retrieval_target], batch.retrieval_target)
        return batch._replace(retrieval_target=renamed)
