import pytest

from cramlab.config import ConfigError
from cramlab.experiments.bounds import POINTS, BoundPoint, bound_config, bounds
from cramlab.experiments.transfer import TARGETS, WAYS, target_config, target_task, transfer
from cramlab.model import SequenceModel
from cramlab.training.start import HEADS


def finished(config, attention_frac):
    metrics = {"test": {"attention_frac": attention_frac}}
    return {"mixer": config.mixer, "variant": config.variant, "metrics": metrics}


def test_sources_come_first_and_random_routers_read_as_much_as_the_carried_one():
    study = transfer(size="small", seed=0, mixers=None)
    assert [run.name for run in next(study)] == ["cram-source-seed0", "seqboat-source-seed0"]
    runs = study.send([])
    assert len(runs) == len(TARGETS) * (len(WAYS) + 2)
    assert len({run.name for run in runs}) == len(runs)
    last = study.send([finished(run, 0.1234) for run in runs])
    assert {run.mixer for run in last} == {"cram-random"}
    assert {run.model.mixer.router.random_frac for run in last} == {0.1234}
    assert {run.source for run in last} == {""}


def test_ways_carry_and_train_what_they_say():
    ways = {way: target_config("cram", "small", 0, "rebound", way) for way in WAYS}
    assert {way for way, run in ways.items() if run.source} == {"head", "embedding", "all"}
    assert ways["head"].trainable == HEADS
    assert ways["scratch"].training.encoding_target > 0 == ways["all"].training.encoding_target
    names = [name for name, _ in SequenceModel(ways["head"].model, ways["head"].task.input_spec).named_parameters()]
    frozen = [name for name in names if not name.startswith(ways["untrained"].trainable)]
    assert frozen
    assert all(".gate." in name for name in frozen)  # an untrained frozen router: everything but it learns


def test_other_patterns_are_other_ones_and_the_rebound_keys_are_the_same():
    assert target_config("cram", "small", 1, "patterns", "head").seed == 501
    assert target_config("cram", "small", 1, "rebound", "head").seed == 1
    assert target_task("rebound", "small").rebind_frac == 1.0
    assert target_task("recall", "small").recurring_frac == 0.0


def test_bound_points_say_what_they_change():
    runs = next(bounds(size="small", seed=0, mixers=None))
    assert len({run.name for run in runs}) == len(runs) == len(POINTS)
    run = bound_config(BoundPoint("cram-random", query_frac=0.1, rebound=True, random_frac=0.3), "small", 0)
    assert (run.task.query_frac, run.task.write_frac, run.task.rebind_frac) == (0.1, 0.2, 1.0)
    assert run.model.mixer.router.random_frac == 0.3


@pytest.mark.parametrize("experiment", [bounds, transfer])
def test_sizes_and_mixers_without_runs_are_named(experiment):
    with pytest.raises(ConfigError, match='size "paper"'):
        next(experiment(size="paper", seed=0, mixers=None))
    with pytest.raises(ConfigError, match="no runs of jamba"):
        next(experiment(size="tiny", seed=0, mixers=("jamba",)))
