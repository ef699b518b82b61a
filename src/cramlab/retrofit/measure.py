"""What a patched model loses and leaves out on documents, paired with the original on the same text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.hf.consolidated import ConsolidatedAttention, Counts, patched
from cramlab.retrofit.learn import token_losses


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


def measured(model: nn.Module, tokens: Tensor, layers: Mapping[int, ConsolidatedAttention]) -> DocumentLoss:
    """One document (T,) with these patches in place; far reads count in all layers that have a patch."""
    for layer in layers.values():
        layer.counts = Counts()
    with patched(model, layers):
        loss = float(token_losses(model, tokens).double().mean())
    far, reads, pairs, causal = (
        sum(getattr(layer.counts, name) for layer in layers.values())
        for name in ("far_tokens", "far_reads", "far_pairs", "causal_pairs")
    )
    windows = sum(layer.counts.window_pairs for layer in layers.values())
    return DocumentLoss(loss, 1 - reads / far if far else 0.0, (windows + pairs) / causal if causal else 0.0)


def set_threshold(layers: Mapping[int, ConsolidatedAttention], threshold: float) -> None:
    """The one threshold that all gates share: a read is worth the same wherever it is made."""
    for layer in layers.values():
        layer.threshold, layer.rule = threshold, None


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
