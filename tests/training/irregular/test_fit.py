"""Planted data: who only looks at the last visit cannot know the label, who looks back can."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from cramlab import records
from cramlab.config import ConfigError
from cramlab.model import SequenceModel
from cramlab.objective import LossConfig
from cramlab.tasks.irregular import DataError, IrregularData, Scaling, Series, collate, split_people
from cramlab.training.irregular import fit as irregular
from cramlab.training.irregular.boosting import fit_boosting, summary
from cramlab.training.irregular.fit import FitConfig, fit, label_metrics, training_loss
from cramlab.training.loop import RunFailedError

TINY = FitConfig(d_model=64, d_mlp=32, max_epochs=8, encoding_epochs=2, learning_rate=3e-3)


def planted(n=240, seed=0):
    """The label is the sign of the first visit's value; all others are noise."""
    rng = np.random.default_rng(seed)
    series = []
    for person in range(n):
        n_visits = int(rng.integers(3, 7))
        values = rng.standard_normal((n_visits, 2))
        values[1:, 1][rng.random(n_visits - 1) < 0.5] = np.nan
        labels = np.full(n_visits, -1)
        labels[-1] = int(values[0, 0] > 0)
        series.append(Series(str(person), np.cumsum(rng.pareto(1.5, n_visits)), values, np.array([50.0]), labels))
    return IrregularData(name="pbcseq", what="planted", channels=("a", "b"), statics=("age",), n_classes=2,
                         time_unit=1.0, series=tuple(series), origin="made")  # fmt: skip


@pytest.mark.parametrize("mixer", ["transformer", "cram"])
def test_models_that_look_back_find_the_planted_label(mixer):
    data = planted()
    found = fit(data, split_people(data.series, 0), mixer, TINY, 0)
    assert found["test"]["auc"] > 0.8
    assert found["test"]["auc_low"] < found["test"]["auc"] < found["test"]["auc_high"]
    assert 2 < found["best_epoch"] <= found["epochs"] <= 8
    assert (found["test"]["reads_frac"] == 1.0) == (mixer == "transformer")
    json.dumps(records.finite(found), allow_nan=False)


def test_the_same_seed_gives_the_same_figures_and_the_test_split_changes_nothing():
    data = planted()
    splits = split_people(data.series, 0)
    config = FitConfig(d_model=64, d_mlp=32, max_epochs=3, encoding_epochs=1)
    first, again = (fit(data, splits, "seqboat", config, 1) for _ in range(2))
    assert first["test"] == again["test"]
    other = fit(data, splits | {"test": splits["test"][:10]}, "seqboat", config, 1)
    assert other["validation"] == first["validation"]


def test_the_loss_audits_labels_and_respects_padding():
    data = planted(12)
    batch = collate(data, data.series, Scaling.of(data.series))
    torch.manual_seed(0)
    model = SequenceModel(irregular.ModelConfig(mixer=irregular.MIXERS["cram"](), d_model=64), data.input_spec)
    dirty = batch._replace(continuous=torch.where(batch.valid[..., None], batch.continuous, torch.nan))
    losses = []
    for given in (batch, dirty):
        loss, _ = training_loss(copy.deepcopy(model), given, FitConfig(), LossConfig(), np.random.default_rng(0), False)
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0])


def test_summaries_look_no_further_than_their_visit():
    one = planted(1).series[0]
    before = summary(one, 1)
    one.values[2:] = 1e6
    assert np.array_equal(before, summary(one, 1), equal_nan=True)
    assert summary(one, 0)[5] == 1  # one value so far
    assert len(before) == 7 * 2 + 1 + 2


def test_boosting_finds_a_label_that_its_summaries_hold():
    data = planted(250)
    for one in data.series:
        one.labels[-1] = int(np.nanmean(one.values[:, 0]) > 0)
    found = fit_boosting(data, split_people(data.series, 0), 0)
    assert found["test"]["auc"] > 0.85
    assert found["n_parameters"] is None


def changed(data, **arrays):
    """The same data with other values or labels, by visits."""
    series = tuple(dataclasses.replace(one, **{n: make(i, one) for n, make in arrays.items()})
                   for i, one in enumerate(data.series))  # fmt: skip
    return dataclasses.replace(data, series=series)


def never(channel):
    """Values in which one channel was never measured."""
    return lambda i, one: np.where(np.arange(2) == channel, np.nan, one.values)


def test_boosting_leaves_out_summaries_that_nobody_has():
    data = changed(planted(60), values=never(1))
    found = fit_boosting(data, split_people(data.series, 0), 0)
    assert found["config"]["n_features_unknown"] == 6  # its count, which is zero, is known
    assert found["test"]["auc"] is not None


@pytest.mark.parametrize("make", [never(0), never(1), lambda i, one: np.ones_like(one.values)])
def test_channels_never_measured_or_constant_give_finite_figures(make):
    data = changed(planted(60), values=make)
    found = fit(data, split_people(data.series, 0), "cram", FitConfig(max_epochs=2, encoding_epochs=1), 0)
    assert all(np.isfinite(found[name]["auc"]) for name in ("validation", "test"))


@pytest.mark.parametrize("label", [1, -1])
def test_labels_of_one_class_or_none_are_refused_by_every_model(label):
    data = changed(planted(60), labels=lambda i, one: np.append(one.labels[:-1], label))
    splits = split_people(data.series, 0)
    with pytest.raises(DataError, match=r"all training labels are 1|nobody in train has a label"):
        fit_boosting(data, splits, 0)
    with pytest.raises(DataError, match=r"all training labels are 1|nobody in train has a label"):
        fit(data, splits, "recurrence", FitConfig(), 0)


def test_an_auc_that_is_not_defined_says_why():
    found = label_metrics(np.array([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]), np.array([2, 1]), 3)
    assert found["accuracy"] == 0.5
    assert (found["auc"], found["auc_undefined"]) == (None, "there are 3 classes")
    found = label_metrics(np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([1, 1]), 2)
    assert (found["accuracy"], found["auc"], found["average_precision"]) == (0.5, None, None)
    assert found["auc_undefined"] == "all 2 labels are 1"
    assert "auc_undefined" not in label_metrics(np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([0, 1]), 2)
    for probabilities, labels in ((np.full((2, 2), np.nan), np.array([0, 1])), (np.empty((0, 2)), np.empty(0))):
        with pytest.raises(ValueError, match="cannot score"):
            label_metrics(probabilities, labels, 2)


def test_untrained_weights_are_never_measured(monkeypatch):
    data = planted(60)
    splits = split_people(data.series, 0)
    with pytest.raises(ValueError, match=r"max_epochs = 2 must exceed fit\.encoding_epochs = 2"):
        fit(data, splits, "recurrence", FitConfig(max_epochs=2, encoding_epochs=2), 0)
    with pytest.raises(ConfigError, match='mixer "crom" is unknown; did you mean "cram"'):
        fit(data, splits, "crom", TINY, 0)
    monkeypatch.setattr(irregular, "_validation_loss", lambda *args: np.nan)
    with pytest.raises(RunFailedError, match="no epoch of 2 gave a finite validation loss"):
        fit(data, splits, "recurrence", FitConfig(max_epochs=2, encoding_epochs=0, patience_epochs=2), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("d_mlp", 1.5),
        ("max_epochs", True),
        ("encoding_epochs", -1),
        ("audit_frac", 2.0),
        ("learning_rate", 0.0),
        ("learning_rate", np.inf),
        ("weight_decay", np.nan),
        ("forecast_weight", -1.0),
        ("forecast_weight", "1"),
    ],
)
def test_bad_fits_are_named(field, value):
    with pytest.raises(ValueError, match=rf"fit\.{field}"):
        FitConfig(**{field: value})
