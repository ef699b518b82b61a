"""Learns adapters and gates stage by stage, and chooses the stage that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cramlab.consolidation.calibration import Calibration
from cramlab.consolidation.learn.closed_form import Learned, Learner
from cramlab.consolidation.learn.gradients import distilled
from cramlab.consolidation.rules.learned import rounded
from cramlab.consolidation.setting import CLOSED_FORM, END, LOCAL, Setting


@dataclass(frozen=True)
class Candidates:
    """Adapters and gates as learned up to each stage.

    Attributes:
        learned: gates and adapters by name of the stage, in order.
        chosen: name of the one that is kept.
        increases: mean loss increase of the first and the last on validation documents, nats per token; empty where
            there is one only.
    """

    learned: dict[str, Learned]
    chosen: str
    increases: dict[str, float]

    def described(self) -> dict[str, Any]:
        """Fields of a record on the gradient steps; losses are means over twentieths of the steps."""
        losses = {
            name: [float(part[:, 0].mean()) for part in learned.history.chunk(20)]
            for name, learned in self.learned.items()
            if learned.history is not None
        }
        return {"chosen": self.chosen, "validation": self.increases, "losses": losses}


def learn(setting: Setting) -> Candidates:
    """Learns in closed form, then by gradient steps on each layer's error, then on the model's output.

    Gradient steps on little text may increase the loss. Therefore the first and the last candidate are compared on
    validation documents, at the median of the shares of `learning_fracs`, and the one with the lower loss is kept.
    """
    last = Learner(setting).learn()
    rounded(last.layers)
    learned = {CLOSED_FORM: last}
    for stage, n_steps in ((LOCAL, setting.config.local_steps), (END, setting.config.end_steps)):
        if n_steps:
            learned[stage] = last = distilled(setting, last, stage, n_steps)
    names = [CLOSED_FORM, list(learned)[-1]] if len(learned) > 1 else []
    increases = {name: _mean_increase(setting, learned[name], name) for name in names}
    return Candidates(learned, min(increases, key=increases.__getitem__, default=CLOSED_FORM), increases)


def _mean_increase(setting: Setting, learned: Learned, name: str) -> float:
    """Mean loss increase on validation documents at the median of `learning_fracs`."""
    config = setting.config
    wanted = config.learning_fracs[(len(config.learning_fracs) - 1) // 2]
    at = min(range(len(config.skipped_fracs)), key=lambda i: abs(config.skipped_fracs[i] - wanted))
    run = Calibration(setting, learned, name)
    return float(run.increases("validation", config.skipped_fracs[at], run.thresholds()[at])[:, 0].mean())
