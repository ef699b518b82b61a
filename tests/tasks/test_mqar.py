import pytest
import torch

from cramlab.config import ConfigError
from cramlab.tasks.check import check_task, reference_scores
from cramlab.tasks.mqar import MQARConfig
from reproduction import goals, tasks_goals

CONFIG = MQARConfig(seq_len=40, n_pairs=5, vocab_size=32)


def test_the_oracle_answers_everything_and_the_floor_one_query_in_n_pairs():
    scores = reference_scores(CONFIG, seed=0)
    assert scores["oracle_acc"] == 1.0
    assert 0.1 < scores["floor_acc"] < 0.4
    assert scores["oracle_reads_frac"] == CONFIG.expected_attention_frac == 0.125


def test_every_key_is_there_twice_and_filler_is_never_a_key():
    batch = CONFIG.draw(range(50), seed=1, split="train")
    for tokens, asked in zip(batch.discrete[..., 0], batch.retrieval_mask, strict=True):
        keys = tokens[:10:2]
        assert len(set(keys.tolist())) == 5
        assert torch.equal(tokens[asked].sort().values, keys.sort().values)
        assert torch.isin(tokens, keys).sum() == 10
        assert not asked[:10].any()


def test_it_keeps_the_contract_and_its_splits_and_seeds_differ():
    check_task(CONFIG, seed=0)
    one, other = (CONFIG.draw(range(4), seed=seed, split="test").discrete for seed in (0, 1))
    assert not torch.equal(one, other)


def test_short_distances_are_asked_more_often():
    batch = CONFIG.draw(range(200), seed=0, split="train")
    asked = batch.retrieval_mask.sum(dim=0)
    assert asked[10] > 2 * asked[38]


@pytest.mark.parametrize("fields", [{"n_pairs": 17}, {"vocab_size": 10}])
def test_pairs_that_do_not_fit_are_refused(fields):
    with pytest.raises(ConfigError, match=r"task\.n_pairs"):
        MQARConfig(**fields)


def test_the_goals_of_tasks_are_those_that_their_command_writes():
    assert goals.read(tasks_goals.TOPIC) == tasks_goals.found()
