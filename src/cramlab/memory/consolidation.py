"""Consolidation: how well the semantic memory reproduces what the episodic one returned, and the loss that makes it."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6


def quality(answer: Tensor, retrieved: Tensor, sigma: float) -> Tensor:
    """`q = exp(-||f_sem - r_E||^2 / sigma^2)` (Eq. 6), (...), without gradient.

    Args:
        answer: f_sem, (..., D).
        retrieved: r_E, (..., D).
        sigma: tolerance, as a share of the size of what this token retrieved. Differs: the paper's sigma is an
            absolute number, which means nothing when the size of r_E drifts in training. The token's own size keeps q
            causal; a mean over the batch would let the future in.
    """
    with torch.no_grad():
        power = retrieved.square().sum(dim=-1).clamp(min=_EPS)
        return torch.exp(-(answer - retrieved).square().sum(dim=-1) / power / sigma**2)


def consolidation_loss(answer: Tensor, retrieved: Tensor, present: Tensor | None = None) -> Tensor:
    """Mean over the tokens that read of `||f_sem - stopgrad(r_E)||^2` (Eq. 5), over the mean power of r_E. Scalar.

    Args:
        answer: f_sem, (..., D). The caller computes it from a detached input: a gradient into the shared input keeps
            in-context retrieval from ever being learned.
        retrieved: r_E, (..., D); detached here.
        present: which of the rows are tokens that read, bool (...), perhaps none; None: all, and there are some.
    """
    target = retrieved.detach()
    power, error = target.square().sum(dim=-1), (answer - target).square().sum(dim=-1)
    if present is None:
        return error.mean() / power.mean().clamp(min=_EPS)
    n = present.sum().clamp(min=1)
    return (error * present).sum() / n / ((power * present).sum() / n).clamp(min=_EPS)


def consolidation_sums(
    answer: Tensor, retrieved: Tensor, sequence: Tensor, n_sequences: int, present: Tensor | None = None
) -> Tensor:
    """`consolidation_loss` of each sequence on its own, times its tokens that read, (B,); zero where none did.

    A sum over tokens, so that the sums of the parts of a batch are those of the whole. Source: ours.

    Args:
        answer: f_sem, (..., D).
        retrieved: r_E, (..., D); detached here.
        sequence: of each row, int64 (...).
        n_sequences: B.
        present: as for `consolidation_loss`.
    """
    target = retrieved.detach()
    power, error = target.square().sum(dim=-1), (answer - target).square().sum(dim=-1)
    there = torch.ones_like(error) if present is None else present.to(error.dtype)

    def total(of_rows: Tensor) -> Tensor:
        return error.new_zeros(n_sequences).index_add(0, sequence.flatten(), (of_rows * there).flatten())

    mean_power = total(power) / total(there).clamp(min=1)
    return total(error) / mean_power.clamp(min=_EPS)
