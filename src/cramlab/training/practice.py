"""Counts how often each recurring pattern occurred and how often it was read: the data of practice curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cramlab.batch import Batch
from cramlab.mixer import Path, Trace
from cramlab.ranks import ALONE, Ranks


def encounter_bins(most: int) -> list[int]:
    """First encounter of each bin: 1, 2, 3, 4, 6, 8, 12, 16, ..., up to `most`."""
    firsts = [1]
    for octave in range(1, most.bit_length() + 1):
        firsts += [2**octave, 3 * 2 ** (octave - 1)]
    return [first for first in firsts if first <= most]


class PracticeLog:
    """Counts over the training stream by pattern and by number of the encounter (paper, section on practice curves).

    Attributes:
        firsts: first encounter of each bin.
        met: queries for each pattern so far, (P,).
        n: encounters by pattern and bin, (P, bins).
        read: share of layers that chose to read, summed over these encounters, (P, bins). Audits do not count.
    """

    def __init__(self, n_patterns: int, most: int = 2**24) -> None:
        self.firsts = np.array(encounter_bins(most))
        self.met = np.zeros(n_patterns, dtype=np.int64)
        self.n = np.zeros((n_patterns, len(self.firsts)), dtype=np.int64)
        self.read = np.zeros((n_patterns, len(self.firsts)))

    def update(self, batch: Batch, traces: Sequence[Trace], ranks: Ranks = ALONE) -> None:
        """Adds a training batch. It is on the CPU, the traces may be elsewhere; sequences count in their order.

        With several ranks, each gives its rows and counts the rows of all.
        """
        chose = torch.stack([trace.path == int(Path.EPISODIC) for trace in traces]).double().mean(dim=0)
        asked = torch.where(batch.valid, batch.pattern, -1).double()
        pattern, read = ranks.gathered(torch.stack([asked, chose.cpu()], dim=-1)).flatten(0, -2).unbind(-1)
        pattern, read = pattern[pattern >= 0].long().numpy(), read[pattern >= 0].numpy()
        order = np.argsort(pattern, kind="stable")
        _, starts, counts = np.unique(pattern[order], return_index=True, return_counts=True)
        rank = np.empty(len(pattern), dtype=np.int64)
        rank[order] = np.arange(len(pattern)) - np.repeat(starts, counts)
        encounter = self.met[pattern] + rank + 1
        bins = np.searchsorted(self.firsts, encounter, side="right") - 1
        np.add.at(self.n, (pattern, bins), 1)
        np.add.at(self.read, (pattern, bins), read)
        np.add.at(self.met, pattern, 1)

    def record(self) -> dict[str, Any] | None:
        """The counts for the run's record, without empty bins at the end; None if no pattern recurred."""
        (used,) = np.nonzero(self.n.sum(axis=0))
        if not len(used):
            return None
        n_bins = int(used[-1]) + 1
        return {
            "first_encounter": self.firsts[:n_bins].tolist(),
            "n": self.n[:, :n_bins].tolist(),
            "read": self.read[:, :n_bins].round(3).tolist(),
        }

    def state(self) -> dict[str, torch.Tensor]:
        """The counts as tensors for a checkpoint."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("met", "n", "read")}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from `state`.

        Raises:
            LookupError: when a part is missing.
            ValueError: when a part has another number of patterns or bins.
        """
        for name, own in self.state().items():
            if state[name].shape != own.shape:
                raise ValueError(f"practice.{name} has shape {tuple(state[name].shape)}, not {tuple(own.shape)}")
            setattr(self, name, state[name].numpy().copy())
