"""Metrics: retrieval accuracy, dynamics error, and three separate shares of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cramlab.batch import Batch, Predictions
from cramlab.mixer import Trace


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Counts over one or more batches. `+` adds them, so that a long test set needs no memory.

    Attributes:
        n_correct: number of correct answers by slice; "all" holds every retrieval token.
        n_queries: number of retrieval tokens by slice.
        squared_error: sum of squared errors over dynamics tokens.
        n_levels: number of dynamics tokens.
    """

    n_correct: Mapping[str, int] = field(default_factory=dict)
    n_queries: Mapping[str, int] = field(default_factory=dict)
    squared_error: float = 0.0
    n_levels: int = 0

    def __add__(self, other: Scores) -> Scores:
        """The scores over the batches of both."""
        return Scores(
            n_correct=_add(self.n_correct, other.n_correct),
            n_queries=_add(self.n_queries, other.n_queries),
            squared_error=self.squared_error + other.squared_error,
            n_levels=self.n_levels + other.n_levels,
        )

    def retrieval_acc(self, name: str = "all") -> float:
        """Share of correct answers in a slice, 0 to 1; NaN when the slice is empty."""
        n = self.n_queries.get(name, 0)
        return self.n_correct[name] / n if n else math.nan

    @property
    def dynamics_mse(self) -> float:
        """Mean squared error of the next level; NaN when there are no dynamics tokens."""
        return self.squared_error / self.n_levels if self.n_levels else math.nan


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in (*a, *(n for n in b if n not in a))}


def score(predictions: Predictions, batch: Batch) -> Scores:
    """Compares predictions with a batch's targets, over all tokens and over each of its slices.

    Args:
        predictions: `level`, float (B, T), and `logits`, float (B, T, n_classes), on the batch's device. They are read
            only at the tokens that the batch's masks name.
        batch: of B sequences of T tokens.

    Raises:
        ValueError: when a prediction has another type, shape or device, is not finite where it is read, or has too few
            classes; the message names it.
    """
    _check(predictions, batch)
    return count(predictions, batch)


def _check(predictions: Predictions, batch: Batch) -> None:
    shape = batch.retrieval_target.shape
    for name, wanted in (("level", shape), ("logits", (*shape, "n_classes"))):
        found = getattr(predictions, name, None)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"predictions.{name} is {kind}; give a tensor of floating-point numbers")
        if found.device != batch.retrieval_target.device:
            raise ValueError(
                f"predictions.{name} is on {found.device}, the batch on {batch.retrieval_target.device}; move one"
            )
        if found.ndim != len(wanted) or found.shape[:2] != shape:
            raise ValueError(f"predictions.{name} has shape {tuple(found.shape)}; give ({', '.join(map(str, wanted))})")
    for name, mask in (("level", batch.dynamics_mask), ("logits", batch.retrieval_mask)):
        read = getattr(predictions, name)[mask]
        wrong = read.isnan() if name == "logits" else ~read.isfinite()  # -inf excludes a class
        if wrong.any():
            tokens = int(wrong.reshape(len(wrong), -1).any(dim=1).sum())
            kind = "NaN" if name == "logits" else "not finite"
            raise ValueError(f"predictions.{name} is {kind} at {tokens} of the {len(wrong)} tokens that are scored")
    answers = batch.retrieval_target[batch.retrieval_mask]
    if len(answers) and predictions.logits.shape[-1] <= (last := int(answers.max())):
        raise ValueError(
            f"predictions.logits has {predictions.logits.shape[-1]} classes, but an answer is class {last}; "
            f"give {last + 1} at least"
        )


def right_answers(predictions: Predictions, batch: Batch) -> Tensor:
    """Retrieval tokens whose largest logit is that of the answer, bool (B, T)."""
    if predictions.logits.ndim == 2:  # of the retrieval tokens alone
        hit = predictions.logits.argmax(dim=-1) == batch.retrieval_target[batch.retrieval_mask]
        return torch.zeros_like(batch.retrieval_mask).masked_scatter(batch.retrieval_mask, hit)
    return (predictions.logits.argmax(dim=-1) == batch.retrieval_target) & batch.retrieval_mask


def count(predictions: Predictions, batch: Batch) -> Scores:
    """Like `score`, but without checks and with a single wait for the device."""
    hit = right_answers(predictions, batch)
    masks = {"all": batch.retrieval_mask} | {n: m & batch.retrieval_mask for n, m in batch.slices.items()}
    error = (predictions.level.detach() - batch.dynamics_target).double().square()
    asked = torch.stack([*masks.values()])
    counts = torch.cat([(asked & hit).sum(dim=(1, 2)), asked.sum(dim=(1, 2)), batch.dynamics_mask.sum()[None]]).tolist()
    return Scores(
        n_correct=dict(zip(masks, counts[: len(masks)], strict=True)),
        n_queries=dict(zip(masks, counts[len(masks) : -1], strict=True)),
        squared_error=float(torch.where(batch.dynamics_mask, error, 0.0).sum()),
        n_levels=counts[-1],
    )


@dataclass(frozen=True, kw_only=True)
class AttentionUse:
    """Sums over tokens, averaged over layers. `+` adds them.

    Attributes:
        gate: sum of the probabilities of reading.
        attended: number of tokens whose output uses attention.
        scored: number of tokens scored against the buffer for any reason.
        n_tokens: number of tokens without padding.
    """

    gate: float = 0.0
    attended: float = 0.0
    scored: float = 0.0
    n_tokens: int = 0

    def __add__(self, other: AttentionUse) -> AttentionUse:
        """The use over the batches of both."""
        return AttentionUse(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def fracs(self) -> dict[str, float]:
        """`gate_mean_frac` (probability), `attention_frac` (path) and `reads_frac` (all scored tokens), 0 to 1."""
        n = max(self.n_tokens, 1)
        return {
            "gate_mean_frac": self.gate / n,
            "attention_frac": self.attended / n,
            "reads_frac": self.scored / n,
        }


def attention_use(traces: Sequence[Trace], valid: Tensor) -> AttentionUse:
    """Counts what the layers did with the valid tokens (B, T) of a batch."""
    n_layers = len(traces)
    probs = [(t.gate_prob.double() * valid).sum() for t in traces]
    attended, scored = (torch.stack([getattr(t, name) for t in traces]) & valid for name in ("attended", "scored"))
    counts = torch.stack([attended.sum(), scored.sum(), valid.sum()]).tolist()  # one wait for the device
    return AttentionUse(
        gate=sum(torch.stack(probs).tolist()) / n_layers,
        attended=counts[0] / n_layers,
        scored=counts[1] / n_layers,
        n_tokens=counts[2],
    )


def consolidation_ratio(end: float, start: float) -> float:
    """Attention at the end of training over attention at the start (paper section 6); NaN if the start is 0."""
    return end / start if start else math.nan
