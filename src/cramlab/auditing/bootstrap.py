"""Bootstrap intervals over documents, as tokens of the same document are not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimates:
    """Figures of any shape with their intervals.

    Attributes:
        value: figures over all documents.
        low: lower ends of the intervals.
        high: upper ends of the intervals. With a single document, `low` and `high` are NaN.
    """

    value: Tensor
    low: Tensor
    high: Tensor

    def tolist(self) -> list:
        """Returns nested lists whose innermost lists are [value, low, high]."""
        return torch.stack([self.value, self.low, self.high], dim=-1).tolist()


class Bootstrap:
    """Resamples of documents, the same for every figure, so that differences between figures are paired."""

    def __init__(self, n_documents: int, n_resamples: int, confidence: float, seed: int) -> None:
        draws = np.random.default_rng(seed).multinomial(n_documents, np.full(n_documents, 1 / n_documents), n_resamples)
        self._weights = torch.from_numpy(draws).double()  # (resamples, documents)
        self._tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        self.n_documents = n_documents

    def __call__(self, sums: Tensor, figure: Callable[[Tensor], Tensor]) -> Estimates:
        """Computes a figure from sums over documents, with percentile intervals.

        Args:
            sums: one row per document, (documents, ...).
            figure: maps the sum over documents to the figure; accepts additional leading dimensions.
        """
        value = figure(sums.sum(dim=0))
        if self.n_documents < 2:
            return Estimates(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
        resampled = (self._weights @ sums.flatten(1)).unflatten(1, sums.shape[1:])
        spread = figure(resampled)
        low, high = (_quantile(spread, tail) for tail in self._tails)
        return Estimates(value, low, high)


def _quantile(spread: Tensor, q: float) -> Tensor:
    """Returns the quantile over the first dimension; torch.quantile limits the number of elements."""
    return torch.from_numpy(np.quantile(spread.numpy(), q, axis=0)) if spread.ndim > 1 else spread.quantile(q)
