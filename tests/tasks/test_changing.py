"""SRCD with change: what changes and when, the least reads, and what a memory that does not notice scores."""

import json

import numpy as np
import pytest
import torch

from cramlab.config import ConfigError
from cramlab.metrics import score
from cramlab.tasks.changing import ChangingConfig, affected, changed_sample, least_reads, memoriser_acc
from cramlab.tasks.check import check_task
from cramlab.tasks.export import export
from cramlab.tasks.srcd import SRCDConfig, patterns, sample
from cramlab.tasks.srcd_oracles import floor, oracle

SIZES = {"seq_len": 64, "n_patterns": 32, "n_values": 16, "query_frac": 0.1, "write_frac": 0.2}
SPLIT = {"seed": 3, "split": "train"}


def config(**changes):
    return ChangingConfig(**SIZES, **({"change_at": 40, "changed_frac": 0.5} | changes))


def values(task, index):
    """Value of each pattern that a sequence asks for."""
    one = changed_sample(task, index=index, **SPLIT)
    return {int(p): int(a) for p, a in zip(one["pattern"], one["answer"], strict=True) if p >= 0}


def test_it_keeps_the_contract():
    for change in ("abrupt", "gradual", "recurring"):
        check_task(config(change=change, change_at=1, period=1, new_frac=0.2), seed=0)


def test_nothing_but_values_of_changed_patterns_differs_from_srcd():
    task, plain = config(), SRCDConfig(**SIZES)
    old, which = patterns(plain, 3).values, affected(task, 3)
    assert which.rebound.sum() == 16
    assert (which.values != old).all()
    for index in (0, 39, 40, 90):
        new, before = changed_sample(task, index=index, **SPLIT), sample(plain, index=index, **SPLIT)
        same = [name for name in before if name not in ("value", "answer", "rebound")]
        assert all(np.array_equal(new[name], before[name]) for name in same)
        for pattern, value in values(task, index).items():
            changed = index >= 40 and which.rebound[pattern]
            assert value == (which.values if changed else old)[pattern]
        queries = np.flatnonzero(new["answer"] >= 0)
        assert (new["value"][new["write_position"][queries]] == new["answer"][queries]).all()


def test_gradual_change_takes_one_pattern_after_another():
    task = config(change="gradual", period=80)
    which, old = affected(task, 3), patterns(task, 3).values
    starts = np.sort(which.starts[which.rebound])
    assert starts[0] == 40
    assert starts[-1] == 40 + 15 * 80 // 16
    for index in range(30, 130, 7):
        for pattern, value in values(task, index).items():
            changed = which.rebound[pattern] and index >= which.starts[pattern]
            assert value == (which.values if changed else old)[pattern]


def test_recurring_change_comes_and_goes():
    task = config(change="recurring", period=25)
    which, old = affected(task, 3), patterns(task, 3).values
    for index in range(20, 120, 6):
        for pattern, value in values(task, index).items():
            changed = which.rebound[pattern] and index >= 40 and (index - 40) // 25 % 2 == 0
            assert value == (which.values if changed else old)[pattern]


@pytest.mark.parametrize("change", ["abrupt", "gradual", "recurring"])
def test_the_least_reads_are_those_of_a_memory_that_is_told_of_changes(change):
    """A slow reader: it forgets a pattern when told that it has changed, and learns it at the next read."""
    task = config(change=change, period=30, new_frac=0.1)
    which, known, reads = affected(task, 3), {}, 0
    for pattern in range(32):
        known[pattern] = not which.new[pattern]
    batch = task.draw(range(110), **SPLIT)
    for index in range(110):
        for pattern in range(32):
            told = which.rebound[pattern] and index == which.starts[pattern]
            if change == "recurring" and which.rebound[pattern] and index >= 40 and (index - 40) % 30 == 0:
                told = True
            if told:
                known[pattern] = False
        for place in range(64):
            pattern = int(batch.pattern[index, place])
            must = bool(batch.slices["novel"][index, place])
            if pattern >= 0 and not known[pattern]:
                must = known[pattern] = True
            assert bool(batch.oracle_reads[index, place]) == must
            reads += must
    assert least_reads(task, range(110), **SPLIT)["attention_frac"] == pytest.approx(reads / (110 * 64))


def test_new_patterns_are_novel_before_they_appear():
    task = config(changed_frac=0.0, new_frac=0.25)
    new, known = affected(task, 3).new, patterns(task, 3)
    assert new.sum() == 8
    assert not any(new[p] for index in range(0, 40) for p in values(task, index))
    assert any(new[p] for index in range(40, 60) for p in values(task, index))
    before, after = (task.draw(range(i, i + 40), **SPLIT) for i in (0, 40))
    plain = SRCDConfig(**SIZES).draw(range(40), **SPLIT)
    assert before.slices["novel"].sum() > plain.slices["novel"].sum()
    assert after.slices["new"].any()
    assert not before.slices["new"].any()
    keys = before.continuous[..., 1:][before.slices["novel"]].double()
    assert torch.cdist(keys, torch.from_numpy(known.keys)).min() > 0.3
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(len(keys), dtype=torch.float64), atol=0.4, rtol=0)


def test_who_looks_up_is_always_right_and_who_remembers_is_not():
    task = config(new_frac=0.1)
    for indices in (range(0, 40), range(40, 80)):
        batch = task.draw(indices, **SPLIT)
        assert score(oracle(task, batch), batch).retrieval_acc() == 1.0
        remembers = score(floor("memoriser", task, batch, seed=3), batch).retrieval_acc()
        assert remembers == pytest.approx(memoriser_acc(task, indices, seed=3), abs=0.12)
    assert memoriser_acc(task, range(40), seed=3) > memoriser_acc(task, range(40, 80), seed=3) + 0.3


def test_it_is_exported_with_its_floors(tmp_path):
    task = config(change_at=5)
    sheet = export(task, tmp_path / "changing.npz", n_sequences=12, **SPLIT)
    assert sheet == json.loads((tmp_path / "changing.npz.datasheet.json").read_text())
    assert sheet["task"] == "srcd-changing"
    assert sheet["oracle"]["attention_frac"] == pytest.approx(least_reads(task, range(12), **SPLIT)["attention_frac"])
    assert sheet["floors"]["memoriser"] == pytest.approx(memoriser_acc(task, range(12), seed=3))
    arrays = np.load(tmp_path / "changing.npz")
    assert np.array_equal(arrays["answer"][7], changed_sample(task, index=7, **SPLIT)["answer"])


def test_bad_configs_are_refused():
    with pytest.raises(ConfigError, match="exceeds 1"):
        config(changed_frac=0.8, new_frac=0.3)
    with pytest.raises(ConfigError, match=r"task\.rebind_frac = 0\.5 must be 0"):
        config(rebind_frac=0.5)
    with pytest.raises(ConfigError, match="key_mode"):
        config(new_frac=0.2, key_mode="token")
