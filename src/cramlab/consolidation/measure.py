"""The loss of a model on documents, and the far reads that its patches skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.install import patched


class DocumentLoss(NamedTuple):
    """One document under one rule.

    Attributes:
        loss: nats per token.
        skipped_frac: share of the far reads that were skipped.
        pairs_frac: pairs of query and key scored, windows included, divided by those of full causal attention.
    """

    loss: float
    skipped_frac: float
    pairs_frac: float


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Loss of each next token of one document (T,), nats, (T - 1,)."""
    return next_losses(model(input_ids=tokens[None], use_cache=False).logits[0], tokens)


def next_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Loss of each next token of a document (T,) under its logits (T, V), nats, (T - 1,)."""
    labels = tokens[1:].to(logits.device)
    parts = [F.cross_entropy(part.float(), wanted, reduction="none")
             for part, wanted in zip(logits[:-1].split(256), labels.split(256), strict=True)]  # fmt: skip
    return torch.cat(parts)


def mean_loss(model: nn.Module, tokens: Tensor) -> float:
    """Loss of a model on one document (T,), nats per token."""
    return float(token_losses(model, tokens).double().mean())


def measured(model: nn.Module, tokens: Tensor, layers: Mapping[int, FarReads]) -> DocumentLoss:
    """Measures one document (T,) with these patches installed, whose counts are reset.

    Args:
        model: a causal language model without a patch.
        tokens: the document, (T,).
        layers: patches by index of the block; shares are over all of them.
    """
    for layer in layers.values():
        layer.tally.reset()
    with patched(model, layers):
        loss = mean_loss(model, tokens)
    counts = sum((layer.counts for layer in layers.values()), Counts())
    return DocumentLoss(loss, counts.skipped_frac, counts.pairs_frac)
