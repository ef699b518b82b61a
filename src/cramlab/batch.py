"""The input of a model from a task: inputs, time gaps, targets, masks and named slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Sizes of a task's inputs and answers, which a model needs to be built.

    Attributes:
        vocab_sizes: number of ids in each categorical channel of `Batch.discrete`.
        n_continuous: number of real channels in `Batch.continuous`. Channel 0 is the level whose next
            value the dynamics head predicts.
        n_classes: number of possible answers of the retrieval head.
    """

    vocab_sizes: tuple[int, ...]
    n_continuous: int
    n_classes: int


class Batch(NamedTuple):
    """B sequences of T tokens.

    Attributes:
        discrete: categorical channels, int64 (B, T, C_discrete).
        continuous: real channels, float32 (B, T, C_continuous).
        gaps: time since the previous event, in task time units, float32 (B, T), >= 0.
        horizons: time until the next event, float32 (B, T), >= 0. Known when the next level is asked for.
        valid: false on padding, bool (B, T).
        dynamics_target: next level, float32 (B, T); used only where `dynamics_mask` is true.
        dynamics_mask: tokens with a dynamics target, bool (B, T).
        retrieval_target: class of the answer, int64 (B, T); used only where `retrieval_mask` is true.
        retrieval_mask: tokens with a retrieval target, bool (B, T).
        slices: named subsets of the retrieval tokens, each bool (B, T).
        pattern: index of the recurring pattern that a token asks for, int64 (B, T); -1 elsewhere. Not an input.
        oracle_reads: tokens that no memory of past sequences can answer, bool (B, T): the least attention.
    """

    discrete: Tensor
    continuous: Tensor
    gaps: Tensor
    horizons: Tensor
    valid: Tensor
    dynamics_target: Tensor
    dynamics_mask: Tensor
    retrieval_target: Tensor
    retrieval_mask: Tensor
    slices: Mapping[str, Tensor]
    oracle_reads: Tensor
    pattern: Tensor

    @property
    def n_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.valid.sum())

    def with_zero_padding(self) -> Batch:
        """The same batch with zeros in all inputs of padding."""
        return self._replace(
            discrete=torch.where(self.valid[..., None], self.discrete, 0),
            continuous=torch.where(self.valid[..., None], self.continuous, 0.0),
            gaps=torch.where(self.valid, self.gaps, 0.0),
            horizons=torch.where(self.valid, self.horizons, 0.0),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        # Copies to an accelerator need not be waited for; copies from it must be complete before they are used.
        at_once = torch.device(device).type == "cuda"
        moved = {n: v.to(device, non_blocking=at_once) for n, v in self._asdict().items() if isinstance(v, Tensor)}
        slices = {name: mask.to(device, non_blocking=at_once) for name, mask in self.slices.items()}
        return self._replace(**moved, slices=slices)


class Predictions(NamedTuple):
    """A model's answer to a batch.

    Attributes:
        level: predicted next level, float (B, T).
        logits: logits of the retrieval answer, float (B, T, n_classes); from `SequenceModel.forward(only_asked=True)`
            perhaps those of the retrieval tokens alone, (number of them, n_classes), in the order of the batch.
    """

    level: Tensor
    logits: Tensor
