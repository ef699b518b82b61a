"""Tokens are what the docstring draws; splits keep people apart; nothing of the test people reaches the scaling."""

import dataclasses

import numpy as np
import pytest

from cramlab.config import ConfigError
from cramlab.tasks.irregular import (
    DataError,
    IrregularData,
    Scaling,
    Series,
    collate,
    split_people,
)  # fmt: skip
from cramlab.tasks.irregular.batches import cut_off

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
    with pytest.raises(ConfigError, match="5 people are too few: validation and test would be empty"):
        split_people([one(f"p{i}", i) for i in range(5)], 0)


def test_scaling_ignores_what_is_missing():
    scaling = Scaling.of([one()])
    assert scaling.channel_mean == pytest.approx([np.mean([1.4, 2.1, 2.0]), np.mean([4.1, 3.9, 3.2])])
    assert scaling.static_std[1] == 1.0  # never known


@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6])
def test_scaling_does_not_depend_on_the_unit(unit):
    measured = np.array([[1.4, 4.1], [NAN, 4.1], [2.1, NAN], [2.0, 4.1]])
    plain, other = (Scaling.of([dataclasses.replace(one(), values=measured * by)]) for by in (1.0, unit))
    assert other.channel_std[0] == pytest.approx(plain.channel_std[0] * unit)
    assert plain.channel_std[1] == other.channel_std[1] == 1.0  # constant


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("person", 7, "series.person = 7; give a name"),
        ("person", " a", "series.person = ' a'"),
        ("times", [0.0, 31.0, 400.0, 410.0], "times .* is list; give a NumPy array of numbers"),
        ("times", np.array([0, 1, 3, 2.0]), r"falls at visit 3 \(3.0 to 2.0\)"),
        ("times", np.array([0, 1, NAN, 2]), "times .* is NaN at visit 2"),
        ("times", np.array([0, 1, 2, np.inf]), "times .* holds inf"),
        ("times", np.arange(3.0), 'values of person "a" has 4 rows; give one for each of the 3 times'),
        ("times", np.empty(0), "times .* is empty"),
        ("times", np.array(["0", "1", "2", "3"]), "is <U1"),
        ("values", np.full((4, 2), -np.inf), "values .* holds -inf"),
        ("values", np.full((4, 2), 1e31), "values .* holds 1e"),
        ("values", np.zeros(4), r"values .* is float64 \(4,\); give .* of 2 dimensions"),
        ("values", np.zeros((4, 2), dtype=object), "values .* is object"),
        ("statics", np.array([np.inf, 1.0]), "statics .* holds inf"),
        ("labels", np.array([-1, -1, -1, 0.5]), "labels .* is float64 .* whole numbers"),
        ("labels", np.array([-1, -1, -2, 0]), "labels .* holds -2"),
        ("labels", np.array([1]), "labels .* has 1 rows"),
    ],
)
def test_bad_series_are_named(field, value, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(one(), **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("channels", (), "channels is empty"),
        ("channels", ("a",), 'values of person "a" has 2 columns, but the data set names 1'),
        ("channels", ("a", "a"), "tuple of different names"),
        ("statics", (), "statics .* has 2 columns, but the data set names 0"),
        ("n_classes", 1, "n_classes = 1; give a whole number from 2"),
        ("n_classes", 2.0, "n_classes = 2.0"),
        ("time_unit", 0.0, "time_unit = 0.0; give a positive"),
        ("time_unit", NAN, "time_unit = nan"),
        ("series", (one(), one("b"), one()), 'series 0 and 2, both of person "a", are equal; keep one'),
        ("series", [one()], "series is list; give a tuple of Series"),
        ("series", (one(label=2),), "holds 2; data.n_classes = 2, so give classes up to 1"),
    ],
)
def test_bad_data_are_named(field, value, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(data([one()]), **{field: value})


def test_the_digest_changes_with_every_number_and_with_nothing_else():
    before = data([one("a"), one("b")])
    assert before.digest() == dataclasses.replace(before, notes=("x",), origin="elsewhere").digest()
    moved = dataclasses.replace(one("a"), times=np.array([0.0, 31.0, 400.0, 411.0]))
    others = [data([one("b"), one("a")]), data([one("a", 0), one("b")]), data([moved, one("b")]),
              dataclasses.replace(before, time_unit=1.0), dataclasses.replace(before, channels=("x", "y"))]  # fmt: skip
    assert len({other.digest() for other in [before, *others]}) == 6


def test_what_a_batch_leaves_out_is_counted():
    busy = dataclasses.replace(one(), labels=np.array([1, -1, 0, 1]))
    assert cut_off([busy, one()], most=2) == {"n_series": 2, "n_visits": 4, "n_labels": 1}
    assert int(collate(data([]), [busy], PLAIN, most=2).retrieval_mask.sum()) == 2  # of three
    assert cut_off([busy]) == {"n_series": 0, "n_visits": 0, "n_labels": 0}


def test_no_series_and_foreign_scalings_are_refused():
    with pytest.raises(DataError, match="0 series of at most 64 visits"):
        collate(data([]), [], PLAIN)
    with pytest.raises(DataError, match="at most 0 visits"):
        collate(data([]), [one()], PLAIN, most=0)
    with pytest.raises(DataError, match="different channels or statics from the scaling"):
        collate(data([]), [one()], Scaling(np.zeros(1), np.ones(1), np.zeros(2), np.ones(2)))
    with pytest.raises(DataError, match="give at least one series"):
        Scaling.of([])
