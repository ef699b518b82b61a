"""The named terms of the objective (Eq. 8 and the gate's) and their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.batch import Batch, Predictions
from cramlab.config import Share, Weight, checked


@checked("training.loss")
class LossConfig:
    """Weights and prices. Terms that a mixer does not return are left out.

    Attributes:
        dynamics_weight: of the squared error of levels, next to the nats of answers.
        read_price: what a read must save to be worth it, in nats plus squared error (ours; the benefit gate).
        gate_weight: of the losses of the benefit gate and of the write gate.
        benefit_cap: largest weight of a token in the gate's loss, nats.
        retrieval_emphasis: factor on retrieval tokens in the gate's loss, as they are few.
        no_read_weight: of the task loss without reads, at tokens that read and with the gate's chance of not reading.
        no_read_floor: least chance of not reading that a token which reads is taught with, 0 to 1. Above 0 also those
            learn to do without a read that the gate would never let go without: a control.
        consolidation_weight: w_cons of Eq. 8.
        episodic_price: lambda_E of Eq. 8, for the Gumbel router.
        semantic_reward: lambda_S of Eq. 8, for the Gumbel router.
        capacity_weight: of the hinge on the share of tokens that pass a mixture-of-depths router.
    """

    dynamics_weight: Weight = 1.0
    read_price: Weight = 0.1
    gate_weight: Weight = 1.0
    benefit_cap: Weight = 2.0
    retrieval_emphasis: Weight = 10.0
    no_read_weight: Weight = 0.5
    no_read_floor: Share = 0.0
    consolidation_weight: Weight = 1.0
    episodic_price: Weight = 0.1
    semantic_reward: Weight = 0.1
    capacity_weight: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Loss of each token, (B, T) each: `retrieval` in nats, `dynamics` squared; zero where there is no such target."""

    retrieval: Tensor
    dynamics: Tensor

    @property
    def total(self) -> Tensor:
        """Both, (B, T)."""
        return self.retrieval + self.dynamics


def token_losses(predictions: Predictions, batch: Batch) -> TokenLosses:
    """Cross-entropy at retrieval tokens and squared error at dynamics tokens."""
    answers = torch.where(batch.retrieval_mask, batch.retrieval_target, 0)
    levels = torch.where(batch.dynamics_mask, batch.dynamics_target, 0.0)
    nats = F.cross_entropy(predictions.logits.transpose(1, 2), answers, reduction="none")
    squared = (predictions.level - levels).square()
    return TokenLosses(
        retrieval=torch.where(batch.retrieval_mask, nats, 0.0), dynamics=torch.where(batch.dynamics_mask, squared, 0.0)
    )


def masked_mean(values: Tensor, mask: Tensor, share: Tensor | None = None) -> Tensor:
    """Mean over the true entries of a mask, each counted with its share; 0 where there are none. Scalar.

    Args:
        values: any shape.
        mask: bool, the same shape.
        share: 0 to 1, the same shape; None: 1 everywhere. Entries with a share above 0 are what the sum is divided by.
    """
    if share is None:
        return (values * mask).sum() / mask.sum().clamp(min=1)
    return (values * mask * share).sum() / (mask & (share > 0)).sum().clamp(min=1)


def task_loss(losses: TokenLosses, batch: Batch, config: LossConfig, share: Tensor | None = None) -> Tensor:
    """Mean nats of an answer plus weighted mean squared error of a level. Scalar.

    Args:
        losses: of each token.
        batch: for its masks.
        config: for the weight.
        share: how much each token counts, 0 to 1, (B, T); None: all of them fully.
    """
    error = masked_mean(losses.dynamics, batch.dynamics_mask, share)
    return masked_mean(losses.retrieval, batch.retrieval_mask, share) + config.dynamics_weight * error


def gate_loss(
    gate_logit: Tensor, with_read: TokenLosses, without: TokenLosses, read: Tensor, batch: Batch, config: LossConfig
) -> Tensor:
    """Weighted cross-entropy of "reading pays" at the tokens that were read. Scalar.

    The benefit of a read is the token's loss without it minus its loss with it; reading pays when that exceeds the
    price, and a mistake costs the distance between the two (the regret), capped. Source: ours.

    Args:
        gate_logit: (B, T).
        with_read: losses of the pass with reads.
        without: losses of the pass without them.
        read: tokens that were read, bool (B, T).
        batch: for its retrieval mask.
        config: price, cap and emphasis.
    """
    with torch.no_grad():
        margin = without.total - with_read.total - config.read_price
        weight = margin.abs().clamp(max=config.benefit_cap) * read
        weight = weight * torch.where(batch.retrieval_mask, config.retrieval_emphasis, 1.0)
        pays = (margin > 0).to(gate_logit.dtype)
    nats = F.binary_cross_entropy_with_logits(gate_logit, pays, reduction="none")
    return (nats * weight).sum() / read.sum().clamp(min=1)
