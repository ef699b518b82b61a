"""A guard: what audits find, that they change nothing, and what happens on an alarm."""

import copy
import dataclasses
import io
import json
import threading

import numpy as np
import pytest
import torch
from consolidated import CONTEXT, SINKS, TEXT, WINDOW, make

import cramlab
from cramlab.consolidation.audits import Pass, arguments, document_increase, seen_pass, token_change
from cramlab.consolidation.guarantee import Guarantee
from cramlab.consolidation.ladder import CLOSED, Rung, ladder_of
from cramlab.consolidation.measure import mean_loss
from cramlab.consolidation.patch import FarReads, closed, consolidatable_sites, installed, remove
from cramlab.consolidation.patch.attach import attach
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import load

LADDER = [{"skipped_frac": share, "threshold": t} for share, t in ((0.1, -0.2), (0.3, -0.1), (0.5, -0.02), (0.6, 0.0))]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def promised(increase):
    return {"promise": dataclasses.asdict(Guarantee(increase=increase, bound=5 * increase, delta=0.1))}


@pytest.fixture
def pretrained():
    return load("glassllm")


@pytest.fixture
def ids(pretrained):
    return torch.tensor(pretrained.encode(TEXT))


def patched(pretrained, folder, **changes):
    make(folder, **changes)
    return cramlab.load_consolidated(pretrained.model, folder)


class ReadsAt(FarReads):
    """A rule that decides as another, except that one token reads: the slow way to audit a token."""

    def __init__(self, rule, place):
        super().__init__(window=rule.window, n_sinks=rule.n_sinks)
        self.rule, self.place = rule, place

    def decide(self, seen):
        reads, answer = self.rule.decide(seen)
        forced = torch.arange(reads.shape[1]) == self.place
        return reads | forced, self.rule.adapt(seen.features) if answer is None else answer


def test_an_audited_document_costs_what_both_models_lose(pretrained, ids, tmp_path):
    tokens = ids[:CONTEXT]
    original = mean_loss(pretrained.model, tokens)
    model = patched(pretrained, tmp_path)
    padded = torch.stack([torch.cat([torch.zeros(9, dtype=torch.int64), tokens]), ids[: CONTEXT + 9]])
    mask = torch.ones_like(padded)
    mask[0, :9] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=padded, attention_mask=mask, position_ids=places)
    seen = seen_pass(arguments(model, (padded, mask), {"position_ids": places}), output)
    assert document_increase(model, seen, 0) == pytest.approx(mean_loss(model, tokens) - original, abs=1e-5)


def test_an_audited_token_changes_what_a_rule_that_reads_there_changes(pretrained, ids, tmp_path):
    tokens, place = ids[None, :60], 45
    model = patched(pretrained, tmp_path)
    output = model(input_ids=tokens, past_key_values=None, use_cache=True)
    seen = Pass(tokens, output.logits, 0, output.past_key_values, {})
    found = token_change(model, seen, 0, place)
    layers = {i: layer.at(layer.threshold) for i, layer in enumerate(installed(model).values())}
    sites = dict(enumerate(consolidatable_sites(model)))
    remove(model)
    attach(model, {i: ReadsAt(layer, place) for i, layer in layers.items()}, sites)
    reads = model(input_ids=tokens).logits[0, place].double().log_softmax(-1)
    without = output.logits[0, place].double().log_softmax(-1)
    assert found == pytest.approx(float((reads.exp() * (reads - without)).sum()), rel=1e-3)
    assert found > 1e-4


def test_a_guard_changes_no_bit(pretrained, ids, tmp_path):
    model = patched(pretrained, tmp_path)
    prompt = ids[None, :40]

    def outputs():
        torch.manual_seed(0)
        scored = model(input_ids=ids[None, :CONTEXT]).logits
        made = model.generate(prompt, max_new_tokens=12, do_sample=True, pad_token_id=0)
        return scored, made, torch.random.get_rng_state()

    before = outputs()
    seen = {name: (set(vars(m)), m.training) for name, m in model.named_modules()}
    guard = cramlab.guard(model, audit_frac=1.0, reference=list(ids[:1200].split(60)))
    after = outputs()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {name: (set(vars(m)), m.training) for name, m in model.named_modules()} == seen
    report = guard.report()
    assert report.audits == {"documents": 1, "tokens": 11}
    assert report.candidates == {"documents": 2, "tokens": 11}
    assert report.left_out == 1  # the prompt, of which generate asks for the last logits only
    guard.remove()
    outputs()
    assert guard.report().audits == report.audits


def test_audits_are_counted_and_paid_for(pretrained, ids, tmp_path):
    model = patched(pretrained, tmp_path)
    model(input_ids=ids[None, :CONTEXT])
    without = cramlab.skip_counts(model).total
    cramlab.guard(model, audit_frac=1.0)
    model(input_ids=ids[None, :CONTEXT])
    both = cramlab.skip_counts(model).total
    n_layers, n_far = len(installed(model)), CONTEXT - WINDOW - SINKS
    assert both.audit_reads == n_layers * n_far
    assert both.audit_pairs == n_layers * CONTEXT * (CONTEXT + 1) // 2
    assert both.far_reads == 2 * without.far_reads
    assert both.skipped_frac == pytest.approx(without.skipped_frac - 0.5)
    assert "to audit" in str(cramlab.skip_counts(model))


def test_a_broken_promise_ends_in_the_original_model(pretrained, ids, tmp_path):
    documents = [ids[i : i + CONTEXT][None] for i in range(0, 900, 3)]
    original = pretrained.model(input_ids=documents[0]).logits
    model = patched(pretrained, tmp_path, **promised(1e-4), ladder=LADDER)
    told = []
    guard = cramlab.guard(model, 0.05, audit_frac=1.0, on_alarm=told.append)
    assert [rung.skipped_frac for rung in guard.ladder] == [0.6, 0.1, 0.0]
    for tokens in documents:
        model(input_ids=tokens)
        if guard.rung.is_closed:
            break
    assert torch.equal(model(input_ids=documents[0]).logits, original)
    assert [alarm.moved_to.skipped_frac for alarm in told] == [0.1, 0.0]
    assert all(alarm.mean > 1e-4 and alarm.evidence >= 2 / 0.05 for alarm in told)
    report = guard.report()
    assert report.alarms == tuple(told)
    assert "moved to the closed patch" in str(report)
    assert "--from FOLDER" in str(report)
    audits = report.audits
    model(input_ids=documents[0])
    assert guard.report().audits == audits  # the original model has nothing to audit
    guard.reset()
    assert not torch.equal(model(input_ids=documents[0]).logits, original)


def test_a_kept_promise_raises_no_alarm(pretrained, ids, tmp_path):
    model = patched(pretrained, tmp_path, **promised(2.0))
    guard = cramlab.guard(model, 0.05, audit_frac=1.0)
    for i in range(40):
        model(input_ids=ids[i : i + CONTEXT][None])
    report = guard.report()
    assert report.audits["documents"] == 40
    assert not report.alarms
    assert report.rung == Rung(0.6, 0.0)


def test_generated_tokens_of_another_kind_raise_an_alarm(pretrained, ids, tmp_path):
    """Reference documents bound the change; a rule that skips what they need exceeds it."""
    model = patched(pretrained, tmp_path, **promised(2.0))
    guard = cramlab.guard(model, 0.2, audit_frac=1.0, reference=list(ids[:1200].split(60)))
    bound = guard.report().promised["tokens"]
    assert 0 < bound < 1
    for layer in installed(model).values():
        layer.threshold = float("inf")
        layer.up.bias.data += 3.0  # the semantic answer has gone stale
    prompt = ids[None, :40]
    for _ in range(20):
        model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        if guard.report().alarms:
            break
    (alarm,) = guard.report().alarms
    assert alarm.watched == "tokens"
    assert alarm.mean > bound
    assert alarm.moved_to == CLOSED


def test_the_audited_share_is_the_one_asked_for(pretrained, tmp_path):
    guard = cramlab.guard(patched(pretrained, tmp_path), audit_frac=0.03)
    sizes = np.random.default_rng(0).integers(1, 40, 2000)
    chosen = [guard._chosen("documents", int(n)) for n in sizes]
    assert all(0 <= b < n and len(set(rows)) == len(rows) for rows, n in zip(chosen, sizes, strict=True) for b in rows)
    share = sum(map(len, chosen)) / sizes.sum()
    assert abs(share - 0.03) < 4 * (0.03 * 0.97 / sizes.sum()) ** 0.5


def test_threads_share_a_guard(pretrained, ids, tmp_path):
    model = patched(pretrained, tmp_path, **promised(2.0))
    alone = model(input_ids=ids[None, :CONTEXT]).logits
    guard = cramlab.guard(model, audit_frac=1.0)
    outputs = []
    threads = [
        threading.Thread(target=lambda: outputs.extend(model(input_ids=ids[None, :CONTEXT]).logits for _ in range(4)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 12
    assert all(torch.equal(output, alone) for output in outputs)
    assert guard.report().audits["documents"] == 12


def test_copies_have_no_guard(pretrained, ids, tmp_path):
    model = patched(pretrained, tmp_path)
    guard = cramlab.guard(model, audit_frac=1.0)
    other = copy.deepcopy(model)
    other(input_ids=ids[None, :CONTEXT])
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    torch.load(file, weights_only=False)(input_ids=ids[None, :CONTEXT])
    assert guard.report().candidates["documents"] == 0
    with closed(model):
        model(input_ids=ids[None, :CONTEXT])
    assert guard.report().candidates["documents"] == 0


def test_the_ladder_doubles_the_reads():
    record = {"skipped_frac": 0.95, "threshold": 1.0, "ladder": [
        {"skipped_frac": s, "threshold": s - 0.5} for s in (0.1, 0.2, 0.5, 0.6, 0.8, 0.9, 0.95)]}  # fmt: skip
    assert [rung.skipped_frac for rung in ladder_of(record)] == [0.95, 0.9, 0.8, 0.6, 0.2, 0.0]
    assert ladder_of({"skipped_frac": 1.0, "threshold": None}) == (Rung(1.0, float("inf")), CLOSED)


def test_a_folder_keeps_its_ladder(tmp_path):
    make(tmp_path, ladder=LADDER)
    assert json.loads((tmp_path / "consolidation.json").read_text())["ladder"] == LADDER


def test_bad_input_is_refused(pretrained, ids, tmp_path):
    with pytest.raises(ConsolidationError, match="no consolidation with a record"):
        cramlab.guard(pretrained.model)
    model = patched(pretrained, tmp_path)
    for name, value in (("alpha", 0), ("alpha", 0.6), ("audit_frac", 0.0), ("audit_frac", "1"), ("alpha", True)):
        with pytest.raises(ConsolidationError, match=f"{name} = {value!r} must be a number above 0"):
            cramlab.guard(model, **{name: value})
    with pytest.raises(ConsolidationError, match=r"reference: 2 documents .* give more"):
        cramlab.guard(model, reference=list(ids[:120].split(60)))
    guard = cramlab.guard(model)
    with pytest.raises(ConsolidationError, match="has a guard already"):
        cramlab.guard(model)
    guard.remove()
    cramlab.guard(model).remove()
