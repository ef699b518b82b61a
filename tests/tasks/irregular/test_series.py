"""Tokens are what the docstring draws; splits keep people apart; nothing of the test people reaches the scaling."""

import dataclasses

import numpy as np
import pytest

from cramlab.config import ConfigError
from cramlab.tasks.irregular import IrregularData, Scaling, Series, collate, split_people

NAN = np.nan


def one(person="a", label=1):
    return Series(
        person,
        np.array([0.0, 31.0, 400.0, 410.0]),
        np.array([[1.4, 4.1], [NAN, 3.9], [2.1, NAN], [2.0, 3.2]]),
        np.array([60.0, NAN]),
        np.array([-1, -1, -1, label]),
    )


def data(series):
    return IrregularData(name="x", what="", channels=("bilirubin", "albumin"), statics=("age", "bmi"), n_classes=2,
                         time_unit=10.0, series=tuple(series), origin="")  # fmt: skip


PLAIN = Scaling(np.zeros(2), np.ones(2), np.zeros(2), np.ones(2))


def test_tokens_carry_the_last_value_whether_it_is_new_and_how_old():
    batch = collate(data([one()]), [one()], PLAIN)
    x = batch.continuous[0].numpy()
    assert x.shape == (4, data([]).input_spec.n_continuous)
    assert np.allclose(x[:, 0], [1.4, 1.4, 2.1, 2.0])  # the level
    assert np.allclose(x[:, 1:3], [[1.4, 4.1], [1.4, 3.9], [2.1, 3.9], [2.0, 3.2]])
    assert np.allclose(x[:, 3:5], [[1, 1], [0, 1], [1, 0], [1, 1]])
    assert np.allclose(np.expm1(x[:, 5:7]), [[0, 0], [3.1, 0], [0, 36.9], [0, 0]], atol=1e-4)
    assert np.allclose(x[:, 7:], [[60, 0, 1, 0]] * 4)
    assert np.allclose(batch.gaps[0], [0, 3.1, 36.9, 1.0])
    assert np.allclose(batch.horizons[0], [3.1, 36.9, 1.0, 0])
    assert batch.dynamics_mask[0].tolist() == [False, True, True, False]  # bilirubin is not measured at visit 1
    assert np.allclose(batch.dynamics_target[0][1:3], [2.1, 2.0])
    assert batch.retrieval_mask[0].tolist() == [False, False, False, True]
    assert batch.retrieval_target[0, 3] == 1


def test_longer_series_keep_their_last_visits_and_shorter_ones_are_padded():
    short = dataclasses.replace(one(), times=np.zeros(1), values=np.ones((1, 2)), labels=np.array([0]))
    batch = collate(data([]), [one(), short], PLAIN, most=3)
    assert batch.valid.tolist() == [[True] * 3, [True, False, False]]
    assert np.allclose(batch.gaps[0], [3.1, 36.9, 1.0])


def test_what_comes_later_is_in_no_earlier_token():
    changed = one()
    changed.values[3] = 99.0
    before, after = (collate(data([]), [s], PLAIN) for s in (one(), changed))
    assert np.allclose(before.continuous[0, :3], after.continuous[0, :3])


def test_people_are_in_one_split_and_labels_are_spread_evenly():
    series = [one(f"p{i % 200}", int(i % 200 < 20)) for i in range(400)]
    splits = split_people(series, 0)
    people = {name: {s.person for s in some} for name, some in splits.items()}
    assert sum(map(len, people.values())) == 200 == len(set().union(*people.values()))
    for name, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert len(people[name]) == pytest.approx(200 * share, abs=2)
        assert np.mean([s.labels.max() for s in splits[name]]) == pytest.approx(0.1, abs=0.03)
    again, other = split_people(series, 0), split_people(series, 1)
    assert [s.person for s in again["test"]] == [s.person for s in splits["test"]]
    assert people["test"] != {s.person for s in other["test"]}
    with pytest.raises(ConfigError, match="4 people are too few"):
        split_people(series[:4], 0)
    with pytest.raises(ConfigError, match="5 people of 5 kinds leave no one for validation and test"):
        split_people([one(f"p{i}", i) for i in range(5)], 0)


def test_scaling_ignores_what_is_missing():
    scaling = Scaling.of([one()])
    assert scaling.channel_mean == pytest.approx([np.mean([1.4, 2.1, 2.0]), np.mean([4.1, 3.9, 3.2])])
    assert scaling.static_std[1] == 1.0  # never known
