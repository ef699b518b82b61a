import numpy as np
import pytest
import torch

from cramlab.metrics import score
from cramlab.tasks.copying import CopyingConfig, sample_copy
from cramlab.tasks.srcd import SRCDConfig
from cramlab.tasks.srcd_oracles import oracle

CONFIG = CopyingConfig(seq_len=32)


def test_what_is_asked_is_what_was_written_in_order():
    one = sample_copy(CONFIG, seed=0, split="train", index=3)
    assert np.array_equal(one["answer"][16:], one["value"][:16])
    assert (one["answer"][:16] == -1).all()
    assert np.array_equal(one["write_position"][16:], np.arange(16))
    assert np.abs(one["key"][:16] - one["key"][16:]).max() < 10 * CONFIG.key_noise


def test_looking_the_key_up_answers_everything():
    batch = CONFIG.dataset(seed=0, split="test", batch_size=4).batch(0)
    assert score(oracle(CONFIG, batch), batch).retrieval_acc() == 1.0
    assert batch.oracle_reads.float().mean() == CONFIG.expected_attention_frac == 0.5
    assert (batch.pattern == -1).all()


def test_values_are_drawn_anew_by_seed_split_and_index_and_nothing_else():
    def values(**changes):
        return sample_copy(CONFIG, **({"seed": 0, "split": "train", "index": 0} | changes))["answer"][16:]

    assert np.array_equal(values(), values())
    for changes in ({"seed": 1}, {"split": "test"}, {"index": 1}):
        assert not np.array_equal(values(), values(**changes))


def test_inputs_have_the_shape_of_srcd():
    assert CONFIG.input_spec == SRCDConfig(seq_len=32).input_spec
    batch = CONFIG.dataset(seed=0, split="train", batch_size=2).batch(0)
    assert torch.isfinite(batch.continuous).all()


@pytest.mark.parametrize(("field", "value"), [("seq_len", 31), ("key_mode", "token")])
def test_what_cannot_be_copied_is_named(field, value):
    with pytest.raises(ValueError, match=rf"task\.{field}"):
        CopyingConfig(**({"seq_len": 32} | {field: value}))
