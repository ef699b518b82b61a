"""Ranking metrics: area under the ROC curve, average precision, and bootstrap intervals over people."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN unless there are both.

    Args:
        scores: one per person, (N,).
        labels: 0 or 1, (N,).
    """
    positive = int((labels == 1).sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the positives of the precision at their score; NaN without positives. Takes what `roc_auc` takes."""
    if not (labels == 1).any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hit, scores = labels[order] == 1, scores[order]
    last_of_tie = np.append(np.diff(scores) != 0, True)
    found, seen = np.cumsum(hit)[last_of_tie], (np.arange(len(hit)) + 1)[last_of_tie]
    recall_gain = np.diff(found, prepend=0) / hit.sum()
    return float((recall_gain * found / seen).sum())


def interval(
    figure: Callable[[np.ndarray, np.ndarray], float],
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    n_resamples: int = 400,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile bootstrap interval of a metric over people.

    Args:
        figure: the metric, a function of scores and labels.
        scores: one per person, (N,).
        labels: 0 or 1, (N,).
        n_resamples: number of bootstrap samples.
        seed: seed of the samples.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        drawn = rng.integers(len(labels), size=len(labels))
        found.append(figure(scores[drawn], labels[drawn]))
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return float(low), float(high)
