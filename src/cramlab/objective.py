"""The training objective: its named terms (Eq. 8 and the read gate's loss) and their composition.

`terms` is the only composition. `batch_terms` applies it to a `SequenceModel`; language models call it themselves. To
add a term, add its weight to `LossConfig` and its line to `terms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.batch import Batch, Predictions
from cramlab.config import Share, Weight, checked
from cramlab.mixer import Trace
from cramlab.model import ModelOutput
from cramlab.ranks import count_over_ranks

_PRICED = ("episodic_use", "semantic_use")  # shares of tokens, which `terms` multiplies by the prices of Eq. 8


@checked("training.loss")
class LossConfig:
    """Weights and prices. A term whose loss a mixer does not return is left out.

    Attributes:
        dynamics_weight: weight of the squared error of levels, relative to the cross-entropy of answers in nats.
        read_price: smallest benefit that makes a read worthwhile, in nats plus squared error (ours; the read gate).
        gate_weight: weight of the losses of the read gate and of the write gate.
        benefit_cap: largest weight of a token in the read gate's loss, in nats.
        retrieval_emphasis: factor on retrieval tokens in the read gate's loss, because they are rare.
        no_read_weight: weight of the task loss without reads, at tokens that read, times the gate's probability of
            not reading.
        no_read_floor: lower bound of that probability, 0 to 1. With 1, every token that reads also learns to predict
            without its read, even where the gate would never skip it.
        consolidation_weight: w_cons of Eq. 8.
        episodic_price: lambda_E of Eq. 8, for the Gumbel router.
        semantic_reward: lambda_S of Eq. 8, for the Gumbel router.
        capacity_weight: weight of the hinge on the share of tokens that pass a mixture-of-depths router.
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
    """Loss of each token. All (B, T).

    Attributes:
        retrieval: cross-entropy of the answer in nats, float; zero where `retrieval_mask` is false.
        dynamics: squared error of the level, float; zero where `dynamics_mask` is false.
        retrieval_mask: tokens with an answer, bool.
        dynamics_mask: tokens with a level, bool.
    """

    retrieval: Tensor
    dynamics: Tensor
    retrieval_mask: Tensor
    dynamics_mask: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of both losses, (B, T)."""
        return self.retrieval + self.dynamics


class Judged(NamedTuple):
    """The reads of one layer, and the losses that show what they are worth.

    Attributes:
        trace: what the layer did. Tokens that it `attended` for are judged.
        with_reads: losses of the pass in which the layer read.
        without_reads: losses of the pass in which it did not.
        threshold: threshold of a gate that learns how many nats a read saves, scalar; None: the gate learns whether the
            read pays at `LossConfig.read_price`.
    """

    trace: Trace
    with_reads: TokenLosses
    without_reads: TokenLosses
    threshold: Tensor | None = None


def terms(
    task: Tensor,
    aux: Mapping[str, Tensor],
    config: LossConfig,
    judged: Judged | None = None,
    *,
    price_ramp: float = 1.0,
    n_targets: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of the objective by name; their sum is the loss. Scalars.

    Args:
        task: the task's loss.
        aux: losses of the mixers by name, averaged over layers; see `MixerOutput.aux`. Those without a weight in the
            config, such as those of a mixer of one's own, have weight 1.
        config: weights and prices.
        judged: the layer that also ran without its reads; None: no layer did.
        price_ramp: share of the prices of Eq. 8 that applies at this step, 0 to 1.
        n_targets: divisor of the sums over judged tokens, so that parts of a batch add up to the batch; None: the
            number of judged tokens.
    """
    weights = {
        "capacity": config.capacity_weight,
        "consolidation": config.consolidation_weight,
        "salience": config.gate_weight,
    }
    found = {"task": task} | {name: weight * aux[name] for name, weight in weights.items() if name in aux}
    found |= {name: loss for name, loss in aux.items() if name not in weights and name not in _PRICED}
    if "episodic_use" in aux:
        found["episodic_price"] = price_ramp * config.episodic_price * aux["episodic_use"]
        found["semantic_reward"] = -price_ramp * config.semantic_reward * aux["semantic_use"]
    elif judged is not None:
        trace, with_reads, without, threshold = judged
        # Weighted by the gate's probability of skipping: a novel query can only be answered by reading.
        goes_without = trace.attended * (1 - trace.gate_prob).clamp(min=config.no_read_floor)
        found["no_read"] = config.no_read_weight * task_loss(without, config, goes_without, n_targets)
        if trace.gate_logit is not None:
            given = trace.gate_logit, with_reads, without, trace.attended, config
            loss = gate_loss(*given, n_targets) if threshold is None else nats_loss(*given, threshold, n_targets)
            found["gate"] = config.gate_weight * loss
    return found


def batch_terms(
    output: ModelOutput, batch: Batch, config: LossConfig, *, layer: int, price_ramp: float = 1.0
) -> dict[str, Tensor]:
    """The terms of a `SequenceModel` on a batch.

    Args:
        output: what the model returned.
        batch: what it was given.
        config: weights and prices.
        layer: the `counterfactual_layer` of the call.
        price_ramp: see `terms`.
    """
    losses = token_losses(output.predictions, batch)
    judged = None
    if output.without_reads is not None:
        judged = Judged(output.traces[layer], losses, token_losses(output.without_reads, batch))
    return terms(task_loss(losses, config), output.aux, config, judged, price_ramp=price_ramp)


def token_losses(predictions: Predictions, batch: Batch) -> TokenLosses:
    """Cross-entropy at retrieval tokens and squared error at dynamics tokens."""
    answers = torch.where(batch.retrieval_mask, batch.retrieval_target, 0)
    levels = torch.where(batch.dynamics_mask, batch.dynamics_target, 0.0)
    if predictions.logits.ndim == 2:  # of the retrieval tokens alone
        asked = F.cross_entropy(predictions.logits, answers[batch.retrieval_mask], reduction="none")
        nats = asked.new_zeros(answers.shape).masked_scatter(batch.retrieval_mask, asked)
    else:
        nats = F.cross_entropy(predictions.logits.transpose(1, 2), answers, reduction="none")
    squared = (predictions.level - levels).square()
    return TokenLosses(
        retrieval=torch.where(batch.retrieval_mask, nats, 0.0),
        dynamics=torch.where(batch.dynamics_mask, squared, 0.0),
        retrieval_mask=batch.retrieval_mask,
        dynamics_mask=batch.dynamics_mask,
    )


def next_token_losses(logits: Tensor, target: Tensor, *, ignored: int) -> TokenLosses:
    """Cross-entropy of text: each token's retrieval target is the token after it, and there are no levels.

    Args:
        logits: (B, T, V).
        target: the token after each, int64 (B, T).
        ignored: value of `target` where there is no target.
    """
    nats = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none", ignore_index=ignored)
    nats = nats.view_as(target)
    has_target = target != ignored
    return TokenLosses(
        retrieval=nats,
        dynamics=torch.zeros_like(nats),
        retrieval_mask=has_target,
        dynamics_mask=torch.zeros_like(has_target),
    )


def masked_mean(values: Tensor, mask: Tensor, share: Tensor | None = None, n: Tensor | None = None) -> Tensor:
    """Mean over the true entries of a mask, each weighted by its share; 0 if the mask has none. Scalar.

    Args:
        values: any shape.
        mask: bool, the same shape.
        share: 0 to 1, the same shape; None: 1 everywhere.
        n: divisor of the sum; None: the number of entries in the mask with a share above 0.
    """
    if share is None:
        total, counted = (values * mask).sum(), mask
    else:
        total, counted = (values * mask * share).sum(), mask & (share > 0)
    return total / (count_over_ranks(counted.sum()) if n is None else n)


def task_loss(losses: TokenLosses, config: LossConfig, share: Tensor | None = None, n: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of an answer plus the weighted mean squared error of a level. Scalar.

    Args:
        losses: losses of each token.
        config: for the weight.
        share: weight of each token, 0 to 1, (B, T); None: 1 everywhere.
        n: see `masked_mean`.
    """
    error = masked_mean(losses.dynamics, losses.dynamics_mask, share, n)
    return masked_mean(losses.retrieval, losses.retrieval_mask, share, n) + config.dynamics_weight * error


def gate_loss(
    gate_logit: Tensor,
    with_reads: TokenLosses,
    without: TokenLosses,
    read: Tensor,
    config: LossConfig,
    n: Tensor | None = None,
) -> Tensor:
    """Weighted cross-entropy of the label "this read pays" at the tokens that were read. Scalar. Source: ours.

    The benefit of a read is the token's loss without it minus its loss with it. Reading pays when the benefit exceeds
    the price; a wrong decision costs the distance between the two (the regret), capped.

    Args:
        gate_logit: logit of reading, (B, T).
        with_reads: losses of the pass with reads.
        without: losses of the pass without them.
        read: tokens that were read, bool (B, T).
        config: price, cap and emphasis.
        n: divisor of the sum; None: the number of tokens that were read.
    """
    with torch.no_grad():
        margin = without.total - with_reads.total - config.read_price
        weight = margin.abs().clamp(max=config.benefit_cap) * read
        weight = weight * torch.where(with_reads.retrieval_mask, config.retrieval_emphasis, 1.0)
        pays = (margin > 0).to(gate_logit.dtype)
    nats = F.binary_cross_entropy_with_logits(gate_logit, pays, reduction="none")
    return (nats * weight).sum() / (count_over_ranks(read.sum()) if n is None else n)


def nats_loss(
    margin: Tensor,
    with_reads: TokenLosses,
    without: TokenLosses,
    read: Tensor,
    config: LossConfig,
    threshold: Tensor,
    n: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the benefit that a gate predicts, at the tokens that were read. Scalar. Source: ours.

    The squared error makes the prediction the expected benefit, so one threshold can rank the tokens of all layers.

    Args:
        margin: predicted benefit minus `threshold`, (B, T).
        with_reads: losses of the pass with reads.
        without: losses of the pass without them.
        read: tokens that were read, bool (B, T).
        config: for the cap, which limits the benefit of a token in either direction.
        threshold: scalar.
        n: divisor of the sum; None: the number of tokens that were read.
    """
    with torch.no_grad():
        benefit = (without.total - with_reads.total).clamp(-config.benefit_cap, config.benefit_cap)
    error = (margin + threshold - benefit).square() * read
    return error.sum() / (count_over_ranks(read.sum()) if n is None else n)
