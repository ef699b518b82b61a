"""Gradient steps as a stage: their state, their batches and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.learn.planting import planted
from cramlab.consolidation.setting import Setting
from cramlab.errors import ConsolidationError

MOST_GRADIENT = 1.0  # norm to which gradients are clipped
N_SOURCES = 2  # contexts come in turn from the text itself and from further text, or twice from the text itself
_WARM_UP = 0.1  # share of the steps


class GradientStage:
    """Learns by gradient steps; `Stages` saves and continues it.

    Attributes:
        parameters: tensors that are learned.
        optimizer: optimiser of these tensors.
        thresholds: thresholds of the gates, one for each share of skipped reads.
        history: one row a step, the loss first.
    """

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    thresholds: Tensor
    history: Tensor

    def state(self) -> dict[str, Any]:
        """What `load` takes back."""
        return {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict(),
                "thresholds": self.thresholds, "history": self.history}  # fmt: skip

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.thresholds.copy_(state["thresholds"])
        self.history.copy_(state["history"])


def take_steps(
    setting: Setting, stage: str, into: GradientStage, step: Callable[[int, Tensor], None], n_steps: int, seed: int
) -> None:
    """Calls `step(i, batch)` `n_steps` times, with batches (B, T), as a stage of this name.

    Raises:
        ConsolidationError: when there is no context to learn from.
    """
    if not setting.parts["learning"]:
        raise ConsolidationError(
            "0 documents are left to learn from, as all are held out; give more text, or lower the numbers of "
            "test, calibration and validation documents"
        )

    def one(item: tuple[int, Tensor]) -> int:
        step(*item)
        return item[1].numel()

    drawn = list(enumerate(batches(setting.parts, setting.config, n_steps, seed)))
    setting.stages.run(stage, drawn, one, into, sum(tokens.numel() for _, tokens in drawn))


def batches(
    parts: Mapping[str, Sequence[Tensor]], config: ConsolidationConfig, n_steps: int, seed: int
) -> Iterator[Tensor]:
    """Batches (B, T): every second context from further text, if there is any; texts are reshuffled every epoch.

    Contexts of different lengths are cut to the shortest of their batch. With `learning_lengths` each step draws a
    length, for which longer contexts are cut out at random places and shorter ones left out, and B falls as T rises.
    """
    sources = [parts["learning"], parts["further"] or parts["learning"]]
    endless = [_shuffled(source, seed * 10 + i) for i, source in enumerate(sources)]
    lengths, chance = (config.context, *config.learning_lengths), torch.Generator().manual_seed(seed)
    n_near = config.window + config.n_sinks

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=chance))

    def context(source: Iterator[Tensor], length: int) -> Tensor:
        long = next(tokens for tokens in source if len(tokens) >= length)
        start = draw(len(long) - length + 1)
        return long[start : start + length]

    for step in range(n_steps):
        if config.learning_lengths:
            length = lengths[draw(len(lengths))]
            size = max(1, config.batch_contexts * config.context // length)
            drawn = [context(endless[(step * size + i) % N_SOURCES], length) for i in range(size)]
        else:
            size = config.batch_contexts
            drawn = [next(endless[(step * size + i) % N_SOURCES]) for i in range(size)]
        shortest = min(map(len, drawn))
        batch = torch.stack([tokens[:shortest] for tokens in drawn])
        yield planted(batch, config.planted_frac, n_near, chance) if config.planted_frac else batch


def _shuffled(contexts: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(contexts), generator=generator).tolist():
            yield contexts[i]


def schedule(step: int, n_steps: int) -> float:
    """Learning rate relative to its peak: a linear warm-up over a tenth of the steps, then a cosine to 0."""
    warm = max(1.0, _WARM_UP * n_steps)
    return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / n_steps)) / 2


def half_precision(device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 on an accelerator, for learning; everything is measured in full precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
