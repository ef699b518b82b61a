"""Gradient-boosted trees on summaries of the series: the usual method for small clinical tables."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cramlab.tasks.irregular import DataError, IrregularData, Series, check_splits
from cramlab.training.irregular.fit import label_metrics

NAME = "gradient-boosting"
DEPTHS = (2, 3, 5)
TREES = {"learning_rate": 0.05, "max_iter": 300, "min_samples_leaf": 10, "l2_regularization": 1.0}


def summary(one: Series, at: int) -> np.ndarray:
    """Summarises the visits up to index `at`.

    Returns:
        (7 C + S + 2,): per channel last value, mean, minimum, maximum, slope, count and time since the last value;
        statics; number of visits and time since the first. NaN, which the trees handle, where nothing was measured.
    """
    times, values = one.times[: at + 1], one.values[: at + 1]
    features: list[float] = []
    for column in values.T:
        known = np.isfinite(column)
        x, t = column[known], times[known]
        if not len(x):
            features += [np.nan] * 5 + [0.0, np.nan]
            continue
        slope = float(np.polyfit(t, x, 1)[0]) if len(np.unique(t)) > 1 else 0.0
        features += [x[-1], x.mean(), x.min(), x.max(), slope, float(len(x)), times[-1] - t[-1]]
    return np.array([*features, *one.statics, float(len(times)), times[-1] - times[0]])


def fit_boosting(data: IrregularData, splits: dict[str, list[Series]], seed: int) -> dict[str, Any]:
    """Fits trees; validation selects their depth and number. Metrics are those of `irregular.fit` without attention.

    Features that are NaN for every person in training, such as those of a channel never measured, are dropped and
    counted.

    Raises:
        DataError: when scikit-learn is not installed, or a split has no labels to train or test on.
    """
    check_splits(splits)
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.metrics import log_loss
    except ImportError as error:
        raise DataError('gradient boosting needs scikit-learn; pip install "cramlab[irregular]"') from error
    begin = time.perf_counter()
    tables = {name: _table(series) for name, series in splits.items()}
    known = np.isfinite(tables["train"][0]).any(axis=0)
    tables = {name: (x[:, known], y) for name, (x, y) in tables.items()}
    classes = np.arange(data.n_classes)
    tried = []
    for depth in DEPTHS:
        trees = HistGradientBoostingClassifier(max_depth=depth, random_state=seed, **TREES)
        trees.fit(*tables["train"])
        staged = list(trees.staged_predict_proba(tables["validation"][0]))
        nats = [
            log_loss(tables["validation"][1], _wide(p, np.asarray(trees.classes_), classes), labels=classes)
            for p in staged
        ]
        tried.append((min(nats), int(np.argmin(nats)), depth, trees))
    _, n_trees, depth, trees = min(tried, key=lambda one: one[0])

    def measured(name: str) -> dict[str, Any]:
        x, y = tables[name]
        probabilities = list(trees.staged_predict_proba(x))[n_trees]
        return label_metrics(_wide(probabilities, np.asarray(trees.classes_), classes), y, data.n_classes)

    return {
        "validation": measured("validation"),
        "test": measured("test"),
        "n_parameters": None,
        "epochs": n_trees + 1,
        "best_epoch": n_trees + 1,
        "seconds": time.perf_counter() - begin,
        "config": {"max_depth": depth, "n_trees": n_trees + 1, "n_features_unknown": int((~known).sum())},
    }


def _table(series: list[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Returns summaries (N, F) and classes (N,) of all visits with a label."""
    rows = [(summary(one, at), one.labels[at]) for one in series for at in np.flatnonzero(one.labels >= 0).tolist()]
    return np.stack([x for x, _ in rows]), np.array([y for _, y in rows])


def _wide(probabilities: np.ndarray, known: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the probabilities with columns of zeros for classes that training has not seen."""
    wide = np.zeros((len(probabilities), len(classes)))
    wide[:, known] = probabilities
    return wide
