"""The table's rounds, rows and rates; its figures are trained elsewhere."""

import copy

import pytest

from cramlab.config import to_dict
from cramlab.experiments.srcd import TRAINING, run_config
from cramlab.experiments.srcd_table import LEARNING_RATES, MAIN, ROWS, best_rates, srcd_table, table_config
from cramlab.experiments.variants import VARIANTS
from cramlab.model import SequenceModel
from cramlab.training.jobs import run_jobs


def tuned(config, retrieval_acc, dynamics_mse):
    metrics = {"validation": {"retrieval_acc": retrieval_acc, "dynamics_mse": dynamics_mse}, "test": None}
    return {"mixer": config.mixer, "config": to_dict(config), "metrics": metrics}


def test_rates_are_chosen_on_validation_and_carried_to_every_seed():
    study = srcd_table(size="small", seed=None, mixers=("transformer", "cram-gumbel"))
    tuning = next(study)
    assert {config.mixer for config in tuning} == {"transformer", "cram"}  # an ablation takes CRAM's own rate
    assert all(config.training.n_test_tokens == 0 for config in tuning)
    best = {"transformer": LEARNING_RATES[0], "cram": LEARNING_RATES[2]}
    runs = study.send([tuned(c, 0.99 if c.training.learning_rate == best[c.mixer] else 0.9, 0.01) for c in tuning])
    assert [(c.mixer, c.seed) for c in runs] == [("transformer", s) for s in range(5)] + [
        ("cram-gumbel", s) for s in range(3)
    ]
    assert {c.training.learning_rate for c in runs if c.mixer == "cram-gumbel"} == {LEARNING_RATES[2]}
    with pytest.raises(StopIteration):
        study.send([])


def test_equal_retrieval_is_decided_by_the_dynamics():
    configs = next(srcd_table(size="small", seed=0, mixers=("cram",)))
    rates = best_rates(tuned(c, 0.998, error) for c, error in zip(configs, (0.012, 0.010, 0.011), strict=True))
    assert rates == {"cram": LEARNING_RATES[1]}


@pytest.mark.parametrize("size", ROWS)
def test_rows_differ_in_their_mixer_and_in_what_their_name_says(size):
    like = to_dict(table_config("transformer", size, 0, 2e-3).training)
    for mixer in ROWS[size]:
        training = to_dict(table_config(mixer, size, 0, 2e-3).training)
        if mixer not in ("cram-no-consolidation", "cram-no-encoding", "cram-fast-semantic", "price-only-taught"):
            assert training == like
    assert set(MAIN) <= set(ROWS["small"]) <= set(VARIANTS)


def test_price_only_has_as_many_parameters_as_cram():
    def count(mixer):
        config = run_config(mixer=mixer, size="small", seed=0)
        return sum(p.numel() for p in SequenceModel(config.model, config.task.input_spec).parameters())

    assert count("price-only") == count("price-only-taught") == pytest.approx(count("cram"), rel=0.001)


def test_ablations_change_what_they_say():
    loss = run_config(mixer="cram-no-consolidation", size="small", seed=0).training.loss
    assert loss.consolidation_weight == loss.no_read_weight == 0
    assert run_config(mixer="cram-no-encoding", size="small", seed=0).training.encoding_target == 0
    assert run_config(mixer="cram-fast-semantic", size="small", seed=0).training.semantic_rate == 10
    assert TRAINING["small"].semantic_rate == 1
    assert run_config(mixer="price-only-taught", size="small", seed=0).training.loss.no_read_floor == 1
    assert TRAINING["small"].loss.no_read_floor == 0


def test_a_tiny_table_is_trained_and_resumed(tmp_path, forked):
    study = srcd_table(size="tiny", seed=0, mixers=("memorizer",))
    found = run_jobs(next(study), tmp_path, resume=False, n_jobs=1)
    assert all(record["metrics"]["test"] is None and record["samples"] == [] for record in found)
    runs = study.send(found)
    (record,) = run_jobs(runs, tmp_path, resume=False, n_jobs=1)
    assert record["metrics"]["test"]["n_queries"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"memorizer-lr{rate:g}-seed1000" for rate in sorted(LEARNING_RATES)),
        "memorizer-seed0",
    ]
    before = copy.deepcopy(record)
    assert run_jobs(runs, tmp_path, resume=True, n_jobs=1) == [before]
