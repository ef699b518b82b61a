"""Intervals by resampling documents: tokens of one document are no independent witnesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimates:
    """Figures with their intervals, of any shape.

    Attributes:
        value: from all documents.
        low: lower ends.
        high: upper ends; NaN, like `low`, when there is one document only.
    """

    value: Tensor
    low: Tensor
    high: Tensor

    def tolist(self) -> list:
        """Nested lists that end in [value, low, high]."""
        return torch.stack([self.value, self.low, self.high], dim=-1).tolist()


class Bootstrap:
    """Resamples of documents, the same for every figure, so that differences keep their pairing."""

    def __init__(self, n_documents: int, n_resamples: int, confidence: float, seed: int) -> None:
        draws = np.random.default_rng(seed).multinomial(n_documents, np.full(n_documents, 1 / n_documents), n_resamples)
        self._weights = torch.from_numpy(draws).double()  # (resamples, documents)
        self._tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        self.n_documents = n_documents

    def __call__(self, sums: Tensor, figure: Callable[[Tensor], Tensor]) -> Estimates:
        """A figure of summed rows, with percentile intervals.

        Args:
            sums: a row a document, (documents, ...).
            figure: maps the sum over documents, (..., with any leading dimensions), to the figure.
        """
        value = figure(sums.sum(dim=0))
        if self.n_documents < 2:
            return Estimates(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
        resampled = (self._weights @ sums.flatten(1)).unflatten(1, sums.shape[1:])
        spread = figure(resampled)
        low, high = (_quantile(spread, tail) for tail in self._tails)
        return Estimates(value, low, high)


def _quantile(spread: Tensor, q: float) -> Tensor:
    """Over the first dimension; torch.quantile has a limit on the number of elements."""
    return torch.from_numpy(np.quantile(spread.numpy(), q, axis=0)) if spread.ndim > 1 else spread.quantile(q)
