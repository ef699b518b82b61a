import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from cramlab.ranking import average_precision, interval, roc_auc


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_figures_are_those_of_scikit_learn(seed, ties):
    rng = np.random.default_rng(seed)
    labels = (rng.random(200) < 0.2).astype(int)
    scores = rng.standard_normal(200) + labels
    scores = scores.round(0) if ties else scores
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))


def test_one_class_has_no_figure():
    assert np.isnan(roc_auc(np.ones(3), np.ones(3)))
    assert np.isnan(average_precision(np.ones(3), np.zeros(3)))


def test_intervals_hold_the_truth_as_often_as_they_say():
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = (np.arange(150) < 50).astype(int)
        low, high = interval(roc_auc, rng.standard_normal(150) + 1.0 * labels, labels, n_resamples=100, seed=seed)
        hits += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert hits >= 52
