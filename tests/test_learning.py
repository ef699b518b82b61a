"""Trains for real; minutes. `make slow`."""

import pytest

from cramlab.experiments.srcd import run_config
from cramlab.training import train


@pytest.mark.slow
def test_cram_learns_to_stop_reading(tmp_path):
    record = train(run_config(mixer="cram", size="small", seed=11), tmp_path)
    test = record["metrics"]["test"]
    assert min(test["retrieval_acc_recurring"], test["retrieval_acc_novel"]) >= 0.99
    assert test["reads_frac"] == test["attention_frac"] <= 1.2 * record["oracle"]["attention_frac"]
    assert test["dynamics_mse"] <= 1.1 * record["oracle"]["dynamics_mse"]
