"""Stale answers of a trained CRAM model in use: reads reopen for the groups that went stale, and close when relearned.

No labels are needed. A read that is made to audit shows what the model answers with it; where the answer without it is
another, the memory that answers without reads was wrong. Evidence by betting, of all audits together and of each group,
decides when that is more than promised.

- An alarm of all together starts a *search*: a larger share of the queries is audited until stale groups are named.
- A group that is named *reopens*: all its queries read, so its answers are right again, and each is an audit for free.
- What these reads say is learned (`learn`) by the answers without reads. The gate keeps its decisions: it knows which
  keys are familiar, and that has not changed.
- A group *closes* when there is evidence that its answers with and without reads agree again.

Source: ours.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.batch import Batch
from cramlab.betting import EProcess, Watch
from cramlab.memory import CRAMLayer
from cramlab.mixer import Routing
from cramlab.model import ModelOutput, SequenceModel

# Weights of what is to stay as it was, beside the cross-entropy of what is learned; chosen on seeds of development.
_ANSWERS, _LEVELS, _GATE = 10.0, 10.0, 100.0


class Reopening:
    """The state of the audits of one model; the model itself is only changed by `learn`.

    Args:
        n_groups: number of groups that queries are told apart by, such as familiar keys.
        alpha: probability of any false alarm until the first group reopens; each later one has as much again.
        promised: share of queries whose answer without a read may be another than with it.
        audit_frac: share of queries that read although the router skips, in peace.
        search_frac: the same after an alarm, until nothing more is named.
        agreed: share of equal answers above which a group closes, shown with confidence 1 - alpha.
        seed: seed of the audits.

    Raises:
        ValueError: when a share is not between 0 and 1, or there is no group.
    """

    def __init__(
        self, n_groups: int, *, alpha: float = 0.01, promised: float = 0.01, audit_frac: float = 0.002,
        search_frac: float = 0.2, agreed: float = 0.95, seed: int = 0,
    ) -> None:  # fmt: skip
        if n_groups < 1:
            raise ValueError(f"n_groups = {n_groups} must be at least 1")
        for name, value in (("audit_frac", audit_frac), ("search_frac", search_frac), ("agreed", agreed)):
            if not 0 < value < 1:
                raise ValueError(f"{name} = {value} must be above 0 and below 1")
        self.n_groups, self.alpha, self.promised = n_groups, alpha, promised
        self.audit_frac, self.search_frac, self.agreed = audit_frac, search_frac, agreed
        self._generator = np.random.default_rng(seed)
        self.open = np.zeros(n_groups, dtype=np.bool_)
        self.searching = False
        self.n_alarms = 0
        self._begin()

    def _begin(self) -> None:
        """Evidence from nothing."""
        self._watch = Watch(self.alpha, self.promised, self.n_groups)
        self._closing = EProcess(self.agreed, (self.n_groups,))
        self._calm = EProcess(self.agreed, (1,))

    @property
    def log_evidence(self) -> float:
        """Largest evidence of staleness since it last began, in nats; there is an alarm at log(1 / alpha)."""
        return float(self._watch.peak[0])

    def reads(self, groups: Tensor, asks: Tensor) -> Tensor:
        """Tokens that read whatever the router decides, bool (B, T): those of open groups, and audits.

        Args:
            groups: group of each token, int64 (B, T); -1: none, which is not audited.
            asks: tokens that ask for an answer, bool (B, T).
        """
        share = self.search_frac if self.searching else self.audit_frac
        audits = torch.from_numpy(self._generator.random(asks.shape) < share)
        is_open = torch.from_numpy(self.open)[groups.clamp(min=0)]
        return (audits | is_open) & asks & (groups >= 0)

    def take(self, groups: Tensor, read: Tensor, differs: Tensor) -> None:
        """Takes what the reads of a batch have shown, and opens and closes groups.

        Args:
            groups: as for `reads`.
            read: what `reads` returned.
            differs: whether the answer with the read is another than without it, bool (B, T).
        """
        for group, wrong in zip(groups[read].tolist(), differs[read].tolist(), strict=True):
            if self.open[group]:
                own = np.arange(self.n_groups) == group
                self._closing.update(1.0 - wrong, own)
                if self._closing.log_evidence[group] >= -math.log(self.alpha):
                    self.open[group] = False
                    self._watch.renew(own)
                    if not self.open.any() and not self.searching:
                        self._begin()
                continue
            self._watch.update(float(wrong), group)
            if self._watch.alarms[0] and not self.searching and not self.open.any():
                self.n_alarms += 1
                self.searching = True
            if self._watch.stale[0, group]:
                self.open[group] = True
                self._closing.renew(np.arange(self.n_groups) == group)
                self._calm = EProcess(self.agreed, (1,))
            elif self.searching:
                self._calm.update(1.0 - wrong)
                if self._calm.log_evidence[0] >= -math.log(self.alpha):
                    self.searching = False
                    if not self.open.any():
                        self._begin()


def answers(output: ModelOutput, read: Tensor) -> Tensor:
    """Whether reading changes the answer, bool (B, T), from a pass with `counterfactual_layer`; false elsewhere."""
    assert output.without_reads is not None
    with_reads, without = output.predictions.logits, output.without_reads.logits
    return (with_reads.argmax(-1) != without.argmax(-1)) & read & output.traces[0].attended


def teachable(model: SequenceModel) -> list[nn.Parameter]:
    """Parameters that `learn` changes, those of semantic memories and read gates; no others ask for gradients."""
    model.requires_grad_(False)
    found: list[nn.Parameter] = []
    for layer in model.modules():
        if isinstance(layer, CRAMLayer):
            found += layer.semantic.parameters()
            found += layer.gate.parameters() if layer.config.router.name == "benefit" else ()
    for parameter in found:
        parameter.requires_grad_()
    return found


def learn(
    model: SequenceModel, before: SequenceModel, optimizer: torch.optim.Optimizer, batch: Batch, read: Tensor
) -> ModelOutput:
    """One step: answers with reads are the targets of those without; what skips, and the gate, stay as `before`.

    Nothing is replayed: tokens that skip are answered by both models, and their answers are held together, as in
    learning without forgetting (Li and Hoiem 2016).

    Args:
        model: a model of one layer, whose read gate learns from benefit.
        before: a copy of it from before it learned, renewed whenever a group closes.
        optimizer: of the parameters that `teachable` returns.
        batch: inputs; its targets are not used.
        read: tokens that are made to read, bool (B, T).

    Returns:
        What the model returned, before the step.
    """
    output = model(batch, routing=Routing(audits=read), counterfactual_layer=0)
    with torch.no_grad():
        kept = before(batch)
    now, then = output.traces[0], kept.traces[0]
    assert output.without_reads is not None
    assert now.gate_logit is not None
    skips = ~now.attended & ~then.attended
    teaches = read & now.attended
    asks, others = batch.retrieval_mask & skips, batch.dynamics_mask & skips
    gate = F.binary_cross_entropy_with_logits(now.gate_logit, then.gate_prob, reduction="none")
    own = output.predictions.logits.detach().argmax(-1)
    answers_now, answers_then = (one.predictions.logits[asks].log_softmax(-1) for one in (output, kept))
    parts = [
        (1.0, F.cross_entropy(output.without_reads.logits[teaches], own[teaches], reduction="none")),
        (_ANSWERS, F.kl_div(answers_now, answers_then, log_target=True, reduction="none").sum(-1)),
        (_LEVELS, (output.predictions.level - kept.predictions.level)[others].square()),
        (_GATE, gate[batch.retrieval_mask]),
        (_GATE, gate[~batch.retrieval_mask]),
    ]
    loss = torch.stack([weight * losses.mean() for weight, losses in parts if losses.numel()]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return output
