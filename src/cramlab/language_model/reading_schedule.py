"""When the tokens of a language model in training may stop reading, and the threshold that keeps their share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cramlab.language_model.run import TextRunConfig

_GROWTH = 1.02  # the gain of reading has stopped growing when it is below this multiple of an earlier one
_PATIENCE = 2  # evaluations between the gains that are compared
_WEIGHT = 0.1  # of the newest batch in the running threshold


@dataclass
class ReadingSchedule:
    """The state of a run's reading; checkpoints hold it as a dict.

    In the encoding phase every token reads. It ends when reading has stopped gaining more, or after
    `TextRunConfig.encoding_frac` of the steps. The share of reads then falls linearly to its target.

    Attributes:
        ended_at: step at which the encoding phase ended; None: it has not.
        gains: by evaluation, loss without reads minus loss with them, nats per token on validation text.
        threshold: running threshold of the gates, scalar, on their device; None: no batch has been seen.
    """

    ended_at: int | None = None
    gains: list[float] = field(default_factory=list)
    threshold: Tensor | None = None

    def reads_all(self, config: TextRunConfig, step: int) -> bool:
        """Whether every token reads at a step. Ends the encoding phase where its share of the steps is used up."""
        if self.ended_at is None and step >= config.encoding_frac * config.n_steps:
            self.ended_at = step
        return self.ended_at is None

    def saw_gain(self, config: TextRunConfig, step: int, gain: float) -> None:
        """Notes the gain of reading after a step, in nats per token, and ends the encoding phase if it stopped growing.

        A gain that has not yet reached `TextRunConfig.least_gain` ends nothing: retrieval has not formed.
        """
        self.gains.append(gain)
        least = float("inf") if config.least_gain is None else config.least_gain
        if self.ended_at is None and len(self.gains) > _PATIENCE and gain >= least:
            earlier = self.gains[-1 - _PATIENCE]
            if gain < _GROWTH * earlier:
                self.ended_at = step

    def share(self, config: TextRunConfig, step: int) -> float:
        """Target share of reads at a step, mean over all layers; 1 while encoding, when all can read."""
        if config.reads_frac is None or self.ended_at is None:
            return 1.0
        passed = (step - self.ended_at) / max(1.0, config.ramp_frac * config.n_steps)
        return config.reads_frac + (1 - config.reads_frac) * max(0.0, 1 - passed)

    def follow(self, margins: Sequence[Tensor], n_layers: int, share: float) -> Tensor:
        """Moves the threshold towards the one at which the tokens of a batch have the share of reads; returns it.

        Args:
            margins: of the gates, any shapes; see `CRAMOutput.gate_margins`. They are relative to the threshold.
            n_layers: layers of the model, with those that cannot read.
            share: target share of reads, mean over these layers.
        """
        moved = quantile_threshold(margins, n_layers, share)
        self.threshold = moved if self.threshold is None else self.threshold + _WEIGHT * moved
        return self.threshold


def quantile_threshold(margins: Sequence[Tensor], n_layers: int, share: float) -> Tensor:
    """The value that a share of the margins exceeds, scalar, one for all layers.

    The share of the margins is `share` times `n_layers` over the number of layers with a gate.

    Args:
        margins: one tensor for each layer with a gate, all of one shape.
        n_layers: layers of the model.
        share: share of reads, mean over the layers.
    """
    every = torch.cat([margin.flatten() for margin in margins]).float()
    n_reads = min(len(every), round(share * n_layers * len(every) / len(margins)))
    if n_reads == len(every):
        return every.min() - 1.0
    return every.sort().values[len(every) - n_reads - 1]  # kthvalue occupies a single multiprocessor
