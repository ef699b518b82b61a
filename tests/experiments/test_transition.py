import pytest

from cramlab.config import ConfigError
from cramlab.experiments.transition import POINTS, Point, transition, transition_config
from cramlab.training.jobs import run_jobs


def test_points_differ_in_router_recurrence_and_encoding_alone():
    runs = next(transition(size="small", seed=None, mixers=None))
    assert len({run.name for run in runs}) == len(runs) == 3 * len(POINTS)
    off = transition_config(Point("cram", encoding=False), "small", 0)
    assert off.training.encoding_target == 0 < transition_config(Point("cram"), "small", 0).training.encoding_target
    assert transition_config(Point("cram", recurring_frac=0.25), "small", 0).task.recurring_frac == 0.25
    assert {run.training.eval_every_steps for run in runs} == {10}


def test_sizes_and_mixers_without_points_are_named():
    with pytest.raises(ConfigError, match='size "paper"; give --size tiny or small'):
        next(transition(size="paper", seed=0, mixers=None))
    with pytest.raises(ConfigError, match="no runs of jamba"):
        next(transition(size="tiny", seed=0, mixers=("jamba",)))


def test_a_tiny_run_is_as_long_as_it_says(tmp_path):
    (config,) = next(transition(size="tiny", seed=0, mixers=("price-only",)))
    (record,) = run_jobs([config], tmp_path, resume=False, n_jobs=1)
    assert record["n_steps"] == 60
    assert [row["step"] for row in record["series"] if row["validation"]] == [10, 20, 30, 40, 50, 60]
