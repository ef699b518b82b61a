"""Splits that cannot teach, choose or test are refused before anything is trained."""

import numpy as np
import pytest

from cramlab.tasks.irregular import DataError, Series, check_splits
from cramlab.tasks.irregular.batches import VISITS_KEPT


def one(person, label, n_visits=2, at=-1):
    labels = np.full(n_visits, -1)
    labels[at] = label
    return Series(person, np.arange(float(n_visits)), np.ones((n_visits, 1)), np.empty(0), labels)


GOOD = {"train": [one("a", 0), one("b", 1)], "validation": [one("c", 0)], "test": [one("d", 1)]}


def test_good_splits_pass():
    check_splits(GOOD)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test": []}, "no series in test; give people for train, validation, test"),
        ({"test": [one("a", 1)]}, 'person "a" is in train and in test; split by person'),
        ({"train": [one("a", 1), one("b", 1)]}, "all training labels are 1; give people of at least two classes"),
        ({"train": [one("a", -1), one("b", -1)]}, "nobody in train has a label"),
        ({"validation": [one("c", -1)]}, "nobody in validation has a label"),
        ({"test": [one("d", 1, VISITS_KEPT + 1, at=0)]}, "nobody in test has a label in the last 64 visits"),
    ],
)
def test_others_are_named(changed, message):
    with pytest.raises(DataError, match=message):
        check_splits(GOOD | changed)
