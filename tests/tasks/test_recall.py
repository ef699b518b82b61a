"""Every recall task: oracle, floor, contract, and no filler that could pass for what is asked."""

import pytest
import torch

from cramlab.config import ConfigError
from cramlab.tasks.check import check_task, reference_scores
from cramlab.tasks.compositional import CompositionalConfig
from cramlab.tasks.induction import MARK, InductionConfig
from cramlab.tasks.mqar import MQARConfig
from cramlab.tasks.phonebook import PhonebookConfig
from cramlab.tasks.rebinding import ASK, FORGET, RebindingConfig
from cramlab.tasks.selective_copying import COPY, SelectiveCopyingConfig
from cramlab.tasks.variable_tracking import VariableTrackingConfig

TASKS = [
    (MQARConfig(seq_len=40, n_pairs=5, vocab_size=32), (0.1, 0.4)),
    (RebindingConfig(seq_len=40, vocab_size=32), (0.05, 0.4)),
    (SelectiveCopyingConfig(seq_len=24, n_items=4), (0.2, 0.45)),
    (InductionConfig(seq_len=24), (0.0, 0.2)),
    (CompositionalConfig(seq_len=40, vocab_size=64), (0.4, 0.65)),
    (PhonebookConfig(seq_len=40, n_letters=2, alphabet=4, vocab_size=32), (0.2, 0.75)),
    (VariableTrackingConfig(seq_len=40, n_hops=2), (0.1, 0.45)),
]
of_each = pytest.mark.parametrize(("task", "floor"), TASKS, ids=lambda given: type(given).__name__)


@of_each
def test_the_oracle_answers_everything_and_the_floor_little(task, floor):
    scores = reference_scores(task, seed=0)
    assert scores["oracle_acc"] == 1.0
    assert floor[0] <= scores["floor_acc"] <= floor[1]
    assert scores["oracle_reads_frac"] == pytest.approx(task.expected_attention_frac)


@of_each
def test_it_keeps_the_contract_and_seeds_differ(task, floor):
    check_task(task, seed=0)
    one, other = (task.draw(range(4), seed=seed, split="test").discrete for seed in (0, 1))
    assert not torch.equal(one, other)


@of_each
def test_an_answer_depends_on_earlier_tokens_alone(task, floor):
    batch = task.draw(range(20), seed=0, split="train")
    answers = task.oracle(batch).logits.argmax(dim=-1)
    for row, at in batch.retrieval_mask.nonzero().tolist():
        tokens = batch.discrete.clone()
        tokens[row, at + 1 :] = tokens[row, at + 1 :].flip(0)
        again = task.oracle(batch._replace(discrete=tokens)).logits.argmax(dim=-1)
        assert again[row, at] == answers[row, at]


def test_every_key_of_mqar_is_there_twice_and_filler_is_never_a_key():
    batch = TASKS[0][0].draw(range(50), seed=1, split="train")
    for tokens, asked in zip(batch.discrete[..., 0], batch.retrieval_mask, strict=True):
        keys = tokens[:10:2]
        assert len(set(keys.tolist())) == 5
        assert torch.equal(tokens[asked].sort().values, keys.sort().values)
        assert torch.isin(tokens, keys).sum() == 10
        assert not asked[:10].any()


def test_mqar_asks_for_short_distances_more_often():
    asked = TASKS[0][0].draw(range(200), seed=0, split="train").retrieval_mask.sum(dim=0)
    assert asked[10] > 2 * asked[38]


def test_rebinding_changes_answers_and_uses_a_key_for_its_events_alone():
    task = RebindingConfig(seq_len=40, vocab_size=32)
    batch = task.draw(range(200), seed=0, split="train")
    kinds = [batch.slices[name] for name in ("unchanged", "rebound", "forgotten")]
    assert torch.equal(torch.stack(kinds).sum(dim=0), batch.retrieval_mask.long())
    assert all(kind.any() for kind in kinds)
    assert (batch.retrieval_target[kinds[2]] == 0).all()
    assert (batch.retrieval_target[kinds[0] | kinds[1]] >= 16).all()
    for tokens in batch.discrete[..., 0]:
        keys = tokens[1:][(tokens[:-1] == ASK) | (tokens[:-1] == FORGET)].unique()
        # 4 keys bound, 2 rebound, 1 forgotten, 4 asked: 11 events hold every occurrence of every key.
        assert torch.isin(tokens, keys).sum() <= 11
        assert (tokens == ASK).sum() == 4
        assert (tokens == FORGET).sum() == 1


def test_items_and_marks_stand_where_they_should():
    tokens = SelectiveCopyingConfig(seq_len=24, n_items=4).draw(range(30), seed=0, split="train").discrete[..., 0]
    assert ((tokens > COPY).sum(dim=1) == 4).all()
    assert (tokens[:, -4:] == COPY).all()
    tokens = InductionConfig(seq_len=24).draw(range(30), seed=0, split="train").discrete[..., 0]
    assert ((tokens == MARK).sum(dim=1) == 2).all()


def test_no_part_of_a_key_is_filler():
    task = CompositionalConfig(seq_len=40, vocab_size=64)
    for tokens in task.draw(range(50), seed=0, split="train").discrete[..., 0]:
        parts = tokens[:12].view(4, 3)[:, :2].unique()
        assert len(parts) == 4
        assert torch.isin(tokens, parts).sum() == 8 + 8


def test_names_in_a_phonebook_are_different_and_one_is_asked_for():
    task = PhonebookConfig(seq_len=40, n_letters=2, alphabet=4, vocab_size=32)
    for tokens in task.draw(range(30), seed=0, split="train").discrete[..., 0]:
        entries = tokens[1:37].view(12, 3)
        assert len(entries[:, :2].unique(dim=0)) == 12
        assert ((entries[:, :2] == tokens[-2:]).all(dim=1)).sum() == 1
        assert (entries[:, 2] >= 6).all()


@pytest.mark.parametrize(
    ("task", "fields", "named"),
    [
        (MQARConfig, {"n_pairs": 17}, "n_pairs"),
        (MQARConfig, {"vocab_size": 10}, "n_pairs"),
        (RebindingConfig, {"n_queries": 40}, "seq_len"),
        (RebindingConfig, {"vocab_size": 12}, "n_keys"),
        (SelectiveCopyingConfig, {"n_items": 33}, "n_items"),
        (SelectiveCopyingConfig, {"vocab_size": 3}, "vocab_size"),
        (InductionConfig, {"seq_len": 2}, "seq_len"),
        (InductionConfig, {"vocab_size": 2}, "vocab_size"),
        (CompositionalConfig, {"n_queries": 5}, "n_queries"),
        (CompositionalConfig, {"n_parts": 5}, "seq_len"),
        (CompositionalConfig, {"vocab_size": 12}, "n_parts"),
        (PhonebookConfig, {"seq_len": 11}, "seq_len"),
        (PhonebookConfig, {"n_letters": 1}, "alphabet"),
        (PhonebookConfig, {"vocab_size": 35}, "vocab_size"),
        (VariableTrackingConfig, {"n_hops": 15}, "seq_len"),
        (VariableTrackingConfig, {"vocab_size": 18}, "vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused(task, fields, named):
    with pytest.raises(ConfigError, match=rf"task\.{named}"):
        task(**fields)
