"""What all steps of a consolidation share: model, sites, config, documents, and the stages that they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.auditing.resume import Resumable, Stages
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.patch.observe import Look, observe
from cramlab.hf.attention_sites import AttentionSite

# Names of candidates, by the stage up to which they were learned; records and stages use them.
CLOSED_FORM, LOCAL, END = "closed form", "local", "end"
ROUTER_ONLY, LORA, SAVED = "router-only", "lora", "saved"


class StageName:
    """Names of stages: files of unfinished work, and keys of a record's `seconds`."""

    sensitivity = "sensitivity"

    @staticmethod
    def moments(part: str) -> str:
        """Sums that adapters are fitted on."""
        return part

    @staticmethod
    def errors(part: str) -> str:
        """Sums that gates are fitted on."""
        return part if part == "gate" else f"{part}-gate"

    @staticmethod
    def original(part: str) -> str:
        """Losses of the original model."""
        return f"{part}-original"

    @staticmethod
    def thresholds(candidate: str) -> str:
        """Quantiles of the gates' scores."""
        return f"{_plain(candidate)}-thresholds"

    @staticmethod
    def increases(candidate: str, part: str, skipped_frac: float) -> str:
        """Losses of the consolidated model."""
        return f"{_plain(candidate)}-{part}-{skipped_frac:g}"


def _plain(candidate: str) -> str:
    return candidate.replace(" ", "-")


@dataclass(frozen=True)
class Setting:
    """What all steps of a consolidation share.

    Attributes:
        model: the original, without a patch.
        sites: attention sub-layers to be consolidated, in order of depth.
        config: sizes and choices.
        parts: contexts (T,) by name of the part, see `documents.parts_of`.
        stages: runs work document by document and saves it.
    """

    model: nn.Module
    sites: Sequence[AttentionSite]
    config: ConsolidationConfig
    parts: Mapping[str, Sequence[Tensor]]
    stages: Stages

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.model.parameters()).device

    def observe(self, tokens: Tensor, look: Look) -> Tensor:
        """Runs the model on tokens (B, T) and calls `look(i, seen)` for each site; see `patch.observe.observe`."""
        return observe(
            self.model, self.sites, tokens, look, window=self.config.window, n_sinks=self.config.n_sinks
        )  # fmt: skip

    def each(self, stage: str, part: str, into: Resumable, step: Callable[[int, Tensor], Any]) -> None:
        """Runs a stage that calls `step(index, document)` for every document of a part and fills `into`."""
        documents = self.parts[part]

        def one(item: tuple[int, Tensor]) -> int:
            step(*item)
            return len(item[1])

        self.stages.run(stage, list(enumerate(documents)), one, into, sum(map(len, documents)))
