import numpy as np
import pytest
import torch

from cramlab.tasks.relabelling import RelabellingConfig, renaming
from cramlab.tasks.srcd import SRCDConfig


@pytest.mark.parametrize("n_values", [2, 16, 64])
def test_every_value_gets_a_name_of_its_own_that_was_not_its_own(n_values):
    names = renaming(n_values)
    assert sorted(names.tolist()) == list(range(n_values))
    assert (names != np.arange(n_values)).all()


def test_nothing_but_the_answers_differs_from_srcd():
    batch, like = (
        config.dataset(seed=3, split="test", batch_size=4).batch(8)
        for config in (RelabellingConfig(seq_len=64), SRCDConfig(seq_len=64))
    )
    for name in ("discrete", "continuous", "gaps", "dynamics_target", "retrieval_mask", "oracle_reads", "pattern"):
        assert torch.equal(getattr(batch, name), getattr(like, name))
    asked = batch.retrieval_mask
    assert asked.any()
    assert torch.equal(batch.retrieval_target[asked], torch.from_numpy(renaming(64))[like.retrieval_target[asked]])
    assert torch.equal(batch.retrieval_target[~asked], like.retrieval_target[~asked])
