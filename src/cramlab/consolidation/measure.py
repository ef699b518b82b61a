"""What a patched model loses and leaves out on documents, paired with the original on the same text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.consolidation.attention import ConsolidatedAttention
from cramlab.consolidation.closed_form import token_losses
from cramlab.consolidation.install import patched
from cramlab.consolidation.patch import Counts, FarReads


class DocumentLoss(NamedTuple):
    """One document under one rule.

    Attributes:
        loss: nats per token.
        skipped_frac: share of the far reads left out.
        pairs_frac: pairs of query and key scored, windows included, over those of full causal attention.
    """

    loss: float
    skipped_frac: float
    pairs_frac: float


def original_loss(model: nn.Module, tokens: Tensor) -> float:
    """Of the model without a patch, nats per token of one document (T,)."""
    return float(token_losses(model, tokens).double().mean())


def measured(model: nn.Module, tokens: Tensor, layers: Mapping[int, FarReads]) -> DocumentLoss:
    """One document (T,) with these patches in place; far reads count in all layers that have a patch."""
    for layer in layers.values():
        layer.tally.reset()
    with patched(model, layers):
        loss = float(token_losses(model, tokens).double().mean())
    done = sum((layer.counts for layer in layers.values()), Counts())
    pairs = done.window_pairs + done.far_pairs
    return DocumentLoss(loss, done.skipped_frac, pairs / done.causal_pairs if done.causal_pairs else 0.0)


def at_threshold(layers: Mapping[int, ConsolidatedAttention], threshold: float) -> dict[int, ConsolidatedAttention]:
    """Layers with the one threshold that all gates share: a read is worth the same wherever it is made."""
    return {i: layer.at(threshold) for i, layer in layers.items()}


class Rows:
    """A table of documents by columns that a stage fills; NaN where nothing has been measured."""

    def __init__(self, n_documents: int, n_columns: int) -> None:
        self.rows = torch.full((n_documents, n_columns), torch.nan, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """What `load` takes back."""
        return {"rows": self.rows}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continues from `state`."""
        self.rows.copy_(state["rows"])
