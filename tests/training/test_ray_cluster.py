"""A sweep over several machines, of which one is lost while it works."""

import pytest

from cramlab.config import overridden
from cramlab.experiments.srcd import run_config
from cramlab.training import train
from cramlab.training.ray_jobs import run_jobs_on_ray

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings are Ray's own
MIXERS = ("transformer", "memorizer", "recurrence")


def short(mixer):
    settings = ["training.max_steps=60", "training.eval_every_steps=10", "training.log_every_steps=10"]
    return overridden(run_config(mixer=mixer, size="tiny", seed=0), settings)


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_lost_machine_loses_no_run_and_repeats_no_finished_one(tmp_path, cluster):
    """Two machines train beside that of the caller; one is lost once both have begun."""
    kept, lost = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    seen = []

    def progress(row):
        seen.append((row["name"], row["step"]))
        if lost in cluster.worker_nodes and len({name for name, _ in seen}) == 2:
            cluster.remove_node(lost, allow_graceful=False)

    configs = [short(mixer) for mixer in MIXERS]
    found = run_jobs_on_ray(configs, tmp_path / "ray", resume=False, n_jobs=2, progress=progress)
    assert cluster.worker_nodes == {kept}
    for config, record in zip(configs, found, strict=True):
        alone = train(config, tmp_path / "alone" / config.name)
        assert record["metrics"] == alone["metrics"]
        assert [row["loss"] for row in record["series"]] == [row["loss"] for row in alone["series"]]
    again = [step for step in set(seen) if seen.count(step) > 1]
    assert len({name for name, _ in again}) <= 1  # only the run of the lost machine went back to its checkpoint
