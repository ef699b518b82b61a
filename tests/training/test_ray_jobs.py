"""On a local cluster of two workers."""

import sys
from pathlib import Path

import pytest

from cramlab import extensions
from cramlab.config import ConfigError, overridden
from cramlab.experiments.srcd import run_config
from cramlab.training import RunFailedError, train
from cramlab.training.ray_jobs import gpus_of_a_run, run_jobs_on_ray

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


def test_runs_share_the_gpus_of_a_cluster_and_none_waits_for_one_that_is_not_there(tmp_path):
    on_cuda = short("transformer", "training.accelerator=cuda")
    assert gpus_of_a_run(short("transformer"), 8, 0) == 0
    assert [gpus_of_a_run(on_cuda, n_jobs, 2) for n_jobs in (1, 2, 3, 4, 5, 8)] == [1, 1, 1 / 2, 1 / 2, 1 / 3, 1 / 4]
    with pytest.raises(ConfigError, match="transformer-seed0, and the Ray cluster has no GPU"):
        run_jobs_on_ray([on_cuda, short("memorizer")], tmp_path, resume=False, n_jobs=2)
    assert not any(tmp_path.iterdir())


MIXER = """
from cramlab.config import checked
from cramlab.baselines.recurrence import RecurrenceConfig

@checked("model.mixer")
class Own(RecurrenceConfig):
    pass
"""


def test_a_mixer_in_a_file_reaches_the_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(extensions, "_loaded", {})
    Path("ray_mixer.py").write_text(MIXER, encoding="utf-8")
    reference = "ray_mixer.py:Own"
    extensions.load_class(reference)
    (found,) = run_jobs_on_ray([short(reference)], tmp_path / "runs", resume=False, n_jobs=1)
    assert found["config"]["model"]["mixer"]["type"] == reference
    assert found["series"][-1]["step"] == 20
