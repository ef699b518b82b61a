"""Carried weights are the source's, frozen ones stay so, and a source that cannot serve is named."""

import dataclasses

import pytest
import torch

from cramlab.config import ConfigError
from cramlab.experiments.transfer import source_config, target_config
from cramlab.files import load_checkpoint
from cramlab.training import train
from cramlab.training.start import HEADS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    source = source_config("cram", "tiny", 0)
    train(source, out / source.name)
    return out, source


def weights(folder, kind):
    held = load_checkpoint(folder / "checkpoint.pt")[kind]
    return {name.removeprefix("module."): value for name, value in held.items() if name != "n_averaged"}


def test_frozen_weights_are_the_sources_and_the_heads_move(runs):
    out, source = runs
    target = target_config("cram", "tiny", 0, "rebound", "head")
    record = train(target, out / target.name)
    before, after = weights(out / source.name, "average"), weights(out / target.name, "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(HEADS) for name in moved)
    assert record["encoding_ended_step"] == 0
    assert record["metrics"]["test"]["n_queries_rebound"] > 0


def test_a_frozen_gate_makes_no_audits(runs):
    out, _ = runs
    target = target_config("cram", "tiny", 0, "recall", "head")
    record = train(target, out / target.name)
    assert {row["phase"] for row in record["series"]} == {"routed"}
    assert target.training.audit_frac == target.training.audit_supervised_frac == 0
    assert record["train_reads_frac"] < 0.9


def test_a_resumed_transfer_is_the_whole_one(runs):
    out, _ = runs
    config = target_config("cram", "tiny", 0, "copy", "all")
    whole = train(config, out / config.name)
    again = train(config, out / config.name, resume=True)
    assert again == whole


def test_a_source_that_is_missing_or_unlike_is_named(runs, tmp_path):
    out, source = runs
    target = target_config("cram", "tiny", 0, "rebound", "head")
    with pytest.raises(ConfigError, match="does not hold a finished run"):
        train(target, tmp_path / target.name)
    wider = dataclasses.replace(target, model=dataclasses.replace(target.model, d_mlp=64), variant="wide")
    with pytest.raises(ConfigError, match="another model or task"):
        train(wider, out / wider.name)
    nothing = dataclasses.replace(target, trainable=("no such",), variant="nothing")
    with pytest.raises(ConfigError, match="matches no parameter"):
        train(nothing, out / nothing.name)
    assert source.name == "cram-source-seed0"
