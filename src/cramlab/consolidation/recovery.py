"""Light recovery: LoRA beside the backbone's own maps, learned while adapters and gates stay as they are.

Everything else in a consolidation leaves the backbone alone. This does not, so it is reported apart.

Source: LoRA after Hu et al. 2022, by peft; what it is taught, ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cramlab.auditing.resume import Stages
from cramlab.consolidation.closed_form import Learned
from cramlab.consolidation.config import RetrofitConfig
from cramlab.consolidation.gradients import (
    MOST_GRADIENT,
    GradientStage,
    course,
    end_loss,
    half_precision,
    rehearse,
    take_steps,
)
from cramlab.consolidation.install import consolidatable_sites
from cramlab.consolidation.lora import Weights, lora, weights_of

if TYPE_CHECKING:
    from peft import PeftModel

_RATE = 5e-4  # of Adam, at its highest


class Recovery(GradientStage):
    """Learns the weights of a LoRA.

    Every context skips one of two shares of its far reads, in turn. The loss is that of the end stage: the divergence
    from what the original says, which is the same model with its LoRA off.

    Args:
        changed: see `lora`.
        model: the same model as it was given to `lora`.
        learned: adapters and gates.
        thresholds: one for each share that is to be recovered.
        config: sizes and choices.
        n_steps: gradient steps.
    """

    def __init__(
        self, changed: PeftModel, model: nn.Module, learned: Learned, thresholds: Sequence[float],
        config: RetrofitConfig, n_steps: int,
    ) -> None:  # fmt: skip
        self.changed, self.model, self.learned, self.config, self.n_steps = changed, model, learned, config, n_steps
        self.sites = consolidatable_sites(model)
        self.device = next(model.parameters()).device
        self.thresholds = torch.tensor(thresholds, device=self.device)
        self.parameters = [parameter for parameter in changed.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=_RATE, betas=(0.9, 0.99))
        self.history = torch.full((n_steps,), torch.nan, dtype=torch.float64)

    def step(self, step: int, tokens: Tensor) -> None:
        """One gradient step; tokens (B, T)."""
        index = step * len(tokens) + torch.arange(len(tokens), device=self.device)
        with half_precision(self.device), torch.enable_grad():
            hidden, _ = rehearse(
                self.model, self.sites, self.learned.layers, self.config, tokens,
                self.thresholds[index // 2 % len(self.thresholds)],
            )  # fmt: skip
            original = self.changed.disable_adapter()
            loss = end_loss(self.model, self.config.end_loss, hidden, tokens, original)
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = _RATE * course(step, self.n_steps)
        torch.nn.utils.clip_grad_norm_(self.parameters, MOST_GRADIENT)
        self.optimizer.step()
        self.history[step] = float(loss.detach())


def recovered(
    model: nn.Module, config: RetrofitConfig, parts: Mapping[str, Sequence[Tensor]], stages: Stages,
    learned: Learned, thresholds: Sequence[float], *, rank: int, n_steps: int,
) -> tuple[Weights, list[float]]:  # fmt: skip
    """The LoRA for a consolidated model, to be given to `lora`.

    Args:
        model: the original, without a patch; it is left as it was.
        config: sizes and choices.
        parts: "learning" and "further" contexts, see `text.parts_of`.
        stages: runs and saves.
        learned: adapters and gates.
        thresholds: one for each share of skipped reads that is to be recovered.
        rank: of each map's LoRA.
        n_steps: gradient steps.

    Returns:
        Its weights, and the loss of every step.

    Raises:
        ConsolidationError: when there is no context to learn from, or peft is missing.
    """
    with lora(model, rank, config.seed) as changed:
        recovery = Recovery(changed, model, learned, thresholds, config, n_steps)
        take_steps(stages, "lora", recovery, recovery.step, parts, config, n_steps, config.seed + 1)
        weights = weights_of(changed)
    return weights, recovery.history.tolist()
