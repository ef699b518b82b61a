"""Reads reopen for stale groups and close again; what is learned uses no labels and changes no reading."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cramlab.memory import CRAMConfig
from cramlab.mixer import Routing
from cramlab.model import ModelConfig, SequenceModel
from cramlab.tasks.changing import ChangingConfig
from cramlab.training import reopening
from cramlab.training.reopening import Reopening, answers, learn, teachable

N_GROUPS = 10
TASK = ChangingConfig(seq_len=64, n_patterns=32, n_values=16, query_frac=0.1, write_frac=0.2, change_at=0)


def serve(state, wrong, n_batches, generator):
    """Batches of queries of all groups; an answer of group g without a read is wrong with probability `wrong[g]`."""
    reads = np.zeros(N_GROUPS)
    for _ in range(n_batches):
        groups = torch.from_numpy(generator.integers(-1, N_GROUPS, (4, 16)))
        asks = torch.from_numpy(generator.random((4, 16)) < 0.8)
        read = state.reads(groups, asks)
        assert not (read & (~asks | (groups < 0))).any()
        assert all(read[(groups == g) & asks].all() for g in np.flatnonzero(state.open))
        chance = torch.from_numpy(np.append(wrong, 0.0))[groups]
        state.take(groups, read, (torch.from_numpy(generator.random((4, 16))) < chance) & read)
        reads += np.bincount(groups[read], minlength=N_GROUPS)
    return reads


def test_peace_costs_the_audited_share():
    state, generator = Reopening(N_GROUPS, audit_frac=0.01), np.random.default_rng(0)
    reads = serve(state, np.full(N_GROUPS, 0.001), 400, generator)
    n = 400 * 64 * 0.8 * 10 / 11
    assert abs(reads.sum() / n - 0.01) < 4 * (0.01 / n) ** 0.5
    assert state.n_alarms == 0
    assert not state.open.any()


def test_stale_groups_open_and_close_when_they_agree_again():
    state, generator = Reopening(N_GROUPS, audit_frac=0.05), np.random.default_rng(1)
    wrong = np.full(N_GROUPS, 0.001)
    wrong[[2, 5]] = 0.9
    serve(state, wrong, 60, generator)
    assert np.flatnonzero(state.open).tolist() == [2, 5]
    assert state.n_alarms == 1
    before = serve(state, wrong, 20, generator)
    assert before[[2, 5]].min() > 60  # every query reads
    wrong[2] = 0.0
    serve(state, wrong, 60, generator)
    assert np.flatnonzero(state.open).tolist() == [5]
    wrong[5] = 0.0
    serve(state, wrong, 60, generator)
    assert not state.open.any()
    assert not state.searching
    wrong[2] = 0.9  # it can happen again
    serve(state, wrong, 80, generator)
    assert np.flatnonzero(state.open).tolist() == [2]
    assert state.n_alarms == 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(mixer=CRAMConfig(), d_model=32), TASK.input_spec).eval()


def test_learning_uses_no_labels_and_changes_only_semantic_memory_and_gate(model):
    batch = TASK.draw(range(4), seed=0, split="test")
    read = batch.retrieval_mask & (batch.pattern >= 0)
    answer, level = batch.retrieval_target, batch.dynamics_target
    other = batch._replace(retrieval_target=(answer + 3) % 16, dynamics_target=level + 1)
    fresh, models = copy.deepcopy(model), [model, copy.deepcopy(model)]
    for one, data in zip(models, (batch, other), strict=True):
        output = learn(one, fresh, torch.optim.Adam(teachable(one), lr=1e-2), data, read)
        assert output.traces[0].attended[read].all()
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in models), strict=True))
    changed = {name for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True)
               if not torch.equal(a, b)}  # fmt: skip
    assert any(".semantic." in name for name in changed)
    assert all(".semantic." in name or ".gate." in name for name in changed)


def test_a_read_differs_where_a_pass_without_reads_answers_otherwise(model):
    batch = TASK.draw(range(4), seed=0, split="test")
    with torch.no_grad():
        model.blocks[0].mixer.episodic.w_out.weight.mul_(30)
        output = model(batch, routing=Routing(audits=batch.retrieval_mask), counterfactual_layer=0)
        silent = model(batch, routing=Routing(skips=batch.valid))
    read = batch.retrieval_mask & (torch.arange(4)[:, None] < 3)
    other = output.predictions.logits.argmax(-1) != silent.predictions.logits.argmax(-1)
    assert (other & read).any()
    assert torch.equal(answers(output, read), other & read)


def learned(model, n_steps=25):
    """Cross-entropy of what reads say without them, before and after; divergence of skipped answers from before."""
    batch = TASK.draw(range(3), seed=0, split="test")
    read = batch.retrieval_mask & (torch.arange(3)[:, None] == 0)
    before, now = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, losses = torch.optim.Adam(teachable(now), lr=1e-2), []
    for _ in range(n_steps):
        output = learn(now, before, optimizer, batch, read)
        own = output.predictions.logits.argmax(-1)
        assert output.without_reads is not None
        losses.append(float(F.cross_entropy(output.without_reads.logits[read].detach(), own[read])))
    with torch.no_grad():
        left, kept = (one(batch) for one in (now, before))
    skipped = batch.retrieval_mask & ~read
    logs = (one.predictions.logits[skipped].log_softmax(-1) for one in (left, kept))
    assert torch.equal(left.traces[0].attended, kept.traces[0].attended)
    return losses[0], losses[-1], float(F.kl_div(*logs, log_target=True, reduction="batchmean"))


def test_learning_moves_answers_without_reads_to_those_with_them_and_keeps_the_rest(model, monkeypatch):
    with torch.no_grad():
        model.blocks[0].mixer.episodic.w_out.weight.mul_(30)  # reads that matter, as after training
        model.blocks[0].mixer.gate.out.bias.fill_(-2.0)  # nothing reads by itself
    first, last, moved = learned(model)
    assert last < 0.8 * first
    monkeypatch.setattr(reopening, "_ANSWERS", 0.0)
    assert moved < 0.5 * learned(model)[2]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="n_groups = 0"):
        Reopening(0)
    with pytest.raises(ValueError, match=r"search_frac = 1\.5"):
        Reopening(3, search_frac=1.5)
