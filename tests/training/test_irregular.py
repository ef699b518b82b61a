"""Planted data: who only looks at the last visit cannot know the label, who looks back can."""

import copy
import json

import numpy as np
import pytest
import torch

from cramlab import records
from cramlab.cli import main
from cramlab.losses import LossConfig
from cramlab.model import SequenceModel
from cramlab.tasks.irregular import IrregularData, Scaling, Series, collate, split_people
from cramlab.training import irregular
from cramlab.training.boosting import fit_boosting, summary
from cramlab.training.irregular import FitConfig, fit, label_metrics, training_loss

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


def test_accuracy_alone_for_more_classes():
    found = label_metrics(np.array([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]), np.array([2, 1]), 3)
    assert found["accuracy"] == 0.5
    assert found["auc"] is None


def test_the_command_writes_resumes_and_refuses(tmp_path, monkeypatch, capsys):
    data = planted(60)
    monkeypatch.setattr("cramlab.cli_irregular.load", lambda name, path: data)
    monkeypatch.setattr("cramlab.cli_irregular.FitConfig", lambda: FitConfig(max_epochs=2, encoding_epochs=1))
    command = ["irregular", "--data", "pbcseq", "--models", "recurrence,gradient-boosting", "--seeds", "1"]
    command += ["--out", str(tmp_path)]
    assert main(command) == 0
    path = tmp_path / "pbcseq" / "recurrence-seed0" / "irregular.json"
    document = json.loads(path.read_text())
    assert document["kind"] == "irregular"
    assert document["data"]["n_series"] == {"train": 36, "validation": 12, "test": 12}
    assert main(command) == 1
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert json.loads(path.read_text()) == document
    assert main([*command[:-2], "--models", "jamba", "--out", str(tmp_path / "x")]) == 2
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value"), [("d_model", 0), ("audit_frac", 2.0), ("learning_rate", 0.0)])
def test_bad_fits_are_named(field, value):
    with pytest.raises(ValueError, match=rf"fit\.{field}"):
        FitConfig(**{field: value})
