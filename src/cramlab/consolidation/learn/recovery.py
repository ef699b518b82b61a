"""Light recovery: LoRA beside the backbone's own maps, learned while adapters and gates stay as they are.

Every other part of a consolidation leaves the backbone alone; recovery does not, so it is reported separately.

Source: LoRA after Hu et al. 2022, by peft; its objective, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cramlab.consolidation.learn.closed_form import Learned
from cramlab.consolidation.learn.lora import Weights, lora, weights_of
from cramlab.consolidation.learn.rehearsal import end_loss, rehearse
from cramlab.consolidation.learn.steps import MOST_GRADIENT, GradientStage, half_precision, schedule, take_steps
from cramlab.consolidation.setting import LORA, Setting

if TYPE_CHECKING:
    from peft import PeftModel

_RATE = 5e-4  # peak learning rate of Adam


class Recovery(GradientStage):
    """Learns the weights of a LoRA.

    Every context skips one of the shares of its far reads, in turn. The loss is that of the end stage: the divergence
    from the output of the original, which is the same model with its LoRA disabled.

    Args:
        changed: the model with LoRA, see `lora`.
        setting: model, sites and config.
        learned: adapters and gates.
        thresholds: thresholds of the gates, one for each share of skipped reads.
        n_steps: number of gradient steps.
    """

    def __init__(
        self, changed: PeftModel, setting: Setting, learned: Learned, thresholds: Sequence[float], n_steps: int
    ) -> None:
        self.changed, self.setting, self.learned, self.n_steps = changed, setting, learned, n_steps
        self.thresholds = torch.tensor(thresholds, device=setting.device)
        self.parameters = [parameter for parameter in changed.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=_RATE, betas=(0.9, 0.99))
        self.history = torch.full((n_steps,), torch.nan, dtype=torch.float64)

    def step(self, step: int, tokens: Tensor) -> None:
        """One gradient step; tokens (B, T)."""
        device = self.thresholds.device
        index = step * len(tokens) + torch.arange(len(tokens), device=device)
        with half_precision(device), torch.enable_grad():
            thresholds = self.thresholds[index // 2 % len(self.thresholds)]
            hidden, _ = rehearse(self.setting, self.learned.layers, tokens, thresholds)
            loss = end_loss(self.setting, hidden, tokens, self.changed.disable_adapter())
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = _RATE * schedule(step, self.n_steps)
        torch.nn.utils.clip_grad_norm_(self.parameters, MOST_GRADIENT)
        self.optimizer.step()
        self.history[step] = float(loss.detach())


def recovered(
    setting: Setting, learned: Learned, thresholds: Sequence[float], *, rank: int, n_steps: int
) -> tuple[Weights, list[float]]:
    """Learns the LoRA of a consolidated model.

    Args:
        setting: model (left as it was), config, stages, and the contexts of "learning" and "further".
        learned: adapters and gates.
        thresholds: thresholds of the gates, one for each share of skipped reads that is to be recovered.
        rank: rank of each map's LoRA.
        n_steps: number of gradient steps.

    Returns:
        The weights, to be given to `lora`, and the loss of every step.

    Raises:
        ConsolidationError: when there is no context to learn from, or peft is missing.
    """
    seed = setting.config.seed
    with lora(setting.model, rank, seed) as changed:
        recovery = Recovery(changed, setting, learned, thresholds, n_steps)
        take_steps(setting, LORA, recovery, recovery.step, n_steps, seed + 1)
        weights = weights_of(changed)
    return weights, recovery.history.tolist()
