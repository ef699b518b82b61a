import pytest

from cramlab.config import ConfigError
from cramlab.experiments.bounds import POINTS, BoundPoint, bound_config, bounds
from cramlab.experiments.transfer import (
    CONTROLS,
    N_CONTROL_SEEDS,
    N_SEEDS,
    OTHER_FACTS,
    SAME_FACTS,
    WAYS,
    target_config,
    target_task,
    transfer,
)
from cramlab.model import SequenceModel
from cramlab.training.jobs import next_job
from cramlab.training.start import HEADS


def finished(config, attention_frac):
    metrics = {"test": {"attention_frac": attention_frac}}
    return {"mixer": config.mixer, "variant": config.variant, "seed": config.seed, "metrics": metrics}


def test_random_routers_read_as_much_as_the_carried_one_of_their_seed():
    study = transfer(size="small", seed=None, mixers=None)
    runs = next(study)
    every = 1 + len(OTHER_FACTS) * len(WAYS) + len(SAME_FACTS) * (len(WAYS) - 1)
    controls = len(OTHER_FACTS) * len(CONTROLS) + 1 + 2 * len(OTHER_FACTS)
    assert len(runs) == N_SEEDS * every + N_CONTROL_SEEDS * controls
    assert len({run.name for run in runs}) == len(runs)
    last = study.send([finished(run, 0.1 + run.seed / 10_000) for run in runs])
    assert len(last) == N_CONTROL_SEEDS * len(OTHER_FACTS)
    assert all(run.mixer == "cram-random" and run.source == "" for run in last)
    assert all(run.model.mixer.router.random_frac == pytest.approx(0.1 + run.seed / 10_000) for run in last)
    with pytest.raises(StopIteration):
        study.send([])
    with pytest.raises(ConfigError, match="no runs of seqboat at seed 1; give a seed below 1"):
        next(transfer(size="small", seed=1, mixers=("seqboat",)))


def test_runs_wait_for_their_own_source_alone_and_no_slot_stays_empty():
    waiting = next(transfer(size="small", seed=0, mixers=("cram",)))
    first = []
    while len(first) < 14:
        first.append(next_job(waiting, {run.name for run in first}))
    assert first[0].variant == "source"
    assert all(run.source == "" for run in first)
    running = {run.name for run in first}
    rest = []
    while waiting and (run := next_job(waiting, running)) is not None:
        rest.append(run)
        running.add(run.name)
    assert all(run.source == "" for run in rest)
    assert waiting
    assert {run.source for run in waiting} == {"cram-source-seed0"}  # all others have begun
    assert next_job(waiting, running - {"cram-source-seed0"}).after == "cram-source-seed0"


def test_a_run_whose_predecessor_never_comes_begins_and_says_so():
    waiting = [target_config("cram", "tiny", 0, "recall", "head")]
    assert next_job(waiting, set()).variant == "recall-head"
    assert next_job([], set()) is None


def test_ways_carry_and_train_what_they_say():
    ways = {way: target_config("cram", "small", 0, "rebound", way) for way in WAYS + CONTROLS}
    assert {way for way, run in ways.items() if run.source} == {"head", "embedding", "all"}
    assert ways["head"].trainable == HEADS
    assert {way for way, run in ways.items() if run.training.encoding_target > 0} == {"scratch"}
    assert {way for way, run in ways.items() if run.training.audit_supervised_frac} == {"scratch", "no_encoding", "all"}
    names = [name for name, _ in SequenceModel(ways["head"].model, ways["head"].task.input_spec).named_parameters()]
    frozen = [name for name in names if not name.startswith(ways["untrained"].trainable)]
    assert frozen
    assert all(".gate." in name for name in frozen)  # an untrained frozen router: everything but it learns


def test_other_patterns_are_other_ones_and_the_rebound_keys_are_the_same():
    assert target_config("cram", "small", 1, "patterns", "head").seed == 501
    assert target_config("cram", "small", 1, "rebound", "head").seed == 1
    assert target_task("rebound", "small").rebind_frac == 1.0
    assert target_task("recall", "small").recurring_frac == 0.0
    assert {target_config("cram", "small", 1, target, "head").seed for target in SAME_FACTS} == {1}
    with pytest.raises(ConfigError, match='target "no" is unknown'):
        target_task("no", "small")


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
