"""The setting that all stages of an audit share: model, attention sites and config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cramlab.auditing.capture import Seen, watching
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.split import Contexts
from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.structure import hidden_states


@dataclass(frozen=True)
class Setting:
    """Model, sites and config of an audit.

    Attributes:
        model: the audited model.
        sites: attention sites of the audited layers.
        config: settings of the audit.
        types: the most frequent token ids, see `probes.frequent_types`.
    """

    model: nn.Module
    sites: list[AttentionSite]
    config: AuditConfig
    types: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.sites[0].device

    def pass_through(self, contexts: Contexts, look: Callable[[int, Seen, Tensor], None]) -> int:
        """Runs one document, calling `look(site, seen, tokens)` per site and batch; returns its number of tokens."""
        for batch in contexts.batches(self.config.batch_tokens):
            tokens = batch.to(self.device)
            with watching(self.sites, lambda i, seen, tokens=tokens: look(i, seen, tokens)):
                hidden_states(self.model, tokens)
        return contexts.tokens.numel()
