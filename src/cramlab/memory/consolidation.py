"""Consolidation: the loss that trains the semantic memory to predict episodic reads, and how well both match."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.ranks import count_over_ranks, mean_over_ranks, over_ranks

_EPS = 1e-6


def quality(answer: Tensor, retrieved: Tensor, sigma: float) -> Tensor:
    """Match of output and read, `q = exp(-||f_sem - r_E||^2 / sigma^2)` (Eq. 6), (...), without gradient.

    Args:
        answer: f_sem, (..., D).
        retrieved: r_E, (..., D).
        sigma: tolerance, relative to the norm of the token's r_E. Differs: the paper's sigma is absolute, which means
            little as the norm of r_E drifts in training. The token's own norm keeps q causal; a mean over the batch
            would depend on future tokens.
    """
    with torch.no_grad():
        power = retrieved.square().sum(dim=-1).clamp(min=_EPS)
        return torch.exp(-(answer - retrieved).square().sum(dim=-1) / power / sigma**2)


def consolidation_loss(answer: Tensor, retrieved: Tensor, present: Tensor | None = None) -> Tensor:
    """Mean of `||f_sem - stopgrad(r_E)||^2` over the tokens that read (Eq. 5), over the mean power of r_E. Scalar.

    Args:
        answer: f_sem, (..., D). The caller computes it from a detached input: with a gradient into the shared input,
            in-context retrieval is never learned.
        retrieved: r_E, (..., D); detached here.
        present: true for rows of tokens that read, bool (...), possibly none; None: all rows, at least one.
    """
    target = retrieved.detach()
    power, error = target.square().sum(dim=-1), (answer - target).square().sum(dim=-1)
    if present is None and not over_ranks():
        return error.mean() / power.mean().clamp(min=_EPS)
    present = torch.ones_like(error, dtype=torch.bool) if present is None else present
    n = count_over_ranks(present.sum())
    return (error * present).sum() / n / (mean_over_ranks((power * present).sum()) / n).clamp(min=_EPS)


def consolidation_sums(
    answer: Tensor, retrieved: Tensor, sequence: Tensor, n_sequences: int, present: Tensor | None = None
) -> Tensor:
    """`consolidation_loss` of each sequence times the number of its tokens that read, (B,); zero if none did.

    Sums, unlike means, do not change when a batch is split into micro-batches. Source: ours.

    Args:
        answer: f_sem, (..., D).
        retrieved: r_E, (..., D); detached here.
        sequence: index of each row's sequence, int64 (...).
        n_sequences: number of sequences, B.
        present: as in `consolidation_loss`.
    """
    target = retrieved.detach()
    power, error = target.square().sum(dim=-1), (answer - target).square().sum(dim=-1)
    there = torch.ones_like(error) if present is None else present.to(error.dtype)

    def total(of_rows: Tensor) -> Tensor:
        return error.new_zeros(n_sequences).index_add(0, sequence.flatten(), (of_rows * there).flatten())

    mean_power = total(power) / total(there).clamp(min=1)
    return total(error) / mean_power.clamp(min=_EPS)
