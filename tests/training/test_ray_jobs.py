"""On a local cluster of two workers."""

import pytest

from cramlab.config import overridden
from cramlab.experiments.srcd import run_config
from cramlab.training import RunFailedError, train
from cramlab.training.ray_jobs import run_jobs_on_ray

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def short(mixer, *overrides):
    return overridden(run_config(mixer=mixer, size="tiny", seed=0), ["training.max_steps=20", *overrides])


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_runs_on_a_cluster_are_those_of_one_process(tmp_path):
    rows = []
    configs = [short("transformer"), short("memorizer")]
    found = run_jobs_on_ray(configs, tmp_path / "ray", resume=False, n_jobs=2, progress=rows.append)
    assert {row["name"] for row in rows} == {config.name for config in configs}
    for config, record in zip(configs, found, strict=True):
        alone = train(config, tmp_path / "alone" / config.name)
        assert record["metrics"] == alone["metrics"]
        assert [row["loss"] for row in record["series"]] == [row["loss"] for row in alone["series"]]
    again = run_jobs_on_ray(configs, tmp_path / "ray", resume=True, n_jobs=2)
    assert [record["date"] for record in again] == [record["date"] for record in found]
    with pytest.raises(FileExistsError, match="--resume"):
        run_jobs_on_ray(configs, tmp_path / "ray", resume=False, n_jobs=2)


def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    configs = [short("transformer", "training.learning_rate=1e30"), short("memorizer")]
    with pytest.raises(RunFailedError, match="transformer-seed0: RunFailedError: term"):
        run_jobs_on_ray(configs, tmp_path, resume=False, n_jobs=1)
    assert (tmp_path / "memorizer-seed0" / "record.json").exists()
