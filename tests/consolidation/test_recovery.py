"""Recovery by LoRA: nothing changes until it has learned, it learns to lose less, and nothing is left of it."""

import dataclasses

import pytest
import torch
from families import build, documents
from torch.nn import functional as F

from cramlab.auditing.resume import Stages
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.learn import recovery as recover
from cramlab.consolidation.learn.closed_form import Learned
from cramlab.consolidation.learn.lora import lora
from cramlab.consolidation.learn.recovery import recovered
from cramlab.consolidation.measure import measured
from cramlab.consolidation.patch.install import patched
from cramlab.consolidation.rules.learned import ConsolidatedAttention, at_threshold
from cramlab.consolidation.setting import Setting
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import attention_sites

N_TOKENS = 40
CONFIG = ConsolidationConfig(context=N_TOKENS, window=6, n_sinks=2, batch_contexts=2)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def setting(request):
    """Model, layers that read nothing and answer nothing, parts."""
    model = build(request.param)
    layers = {
        site.layer: ConsolidatedAttention.beside(site, rank=1, window=6, n_sinks=2).requires_grad_(False)
        for site in attention_sites(model)
    }
    learned = Learned(layers, [], [], [], [1.0] * len(layers), [])
    return model, learned, {"learning": documents(6, N_TOKENS), "further": []}


def test_it_changes_nothing_until_it_has_learned_and_leaves_nothing_behind(setting):
    model, _, parts = setting
    tokens = parts["learning"][0][None]
    before, asked = model(tokens).logits, [p.requires_grad for p in model.parameters()]
    names = [name for name, _ in model.named_modules()]
    with lora(model, rank=2, seed=0) as changed:
        assert sum(p.requires_grad for p in changed.parameters()) >= 8
        assert torch.equal(model(tokens).logits, before)
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert not torch.allclose(model(tokens).logits, before)
        with changed.disable_adapter():
            assert torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == asked


def of(model, parts, stages=None):
    return Setting(model, attention_sites(model), CONFIG, parts, stages or Stages(None, "", None))


def test_it_learns_to_say_what_the_original_says(setting, monkeypatch):
    model, learned, parts = setting
    monkeypatch.setattr(recover, "_RATE", 2e-2)  # large, and one text by heart: this model has learned nothing to keep
    parts = parts | {"learning": parts["learning"][:1]}
    weights, losses = recovered(of(model, parts), learned, [float("inf")], rank=4, n_steps=40)
    assert losses[-1] < 0.7 * losses[0]
    tokens = parts["learning"][0]
    learned = dataclasses.replace(learned, layers=at_threshold(learned.layers, float("inf")))
    with lora(model, rank=4, seed=0, weights=weights) as changed:
        assert measured(model, tokens, learned.layers).skipped_frac == 1
        assert divergence(changed, learned, tokens) == pytest.approx(losses[-1], rel=0.2)
        for name, parameter in changed.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert divergence(changed, learned, tokens) == pytest.approx(losses[0], rel=1e-3)


def divergence(changed, learned, tokens):
    """As executed: of the original's next token from the consolidated model's, a mean over tokens."""
    model = changed.get_base_model()
    with changed.disable_adapter():
        wanted = model(tokens[None]).logits.log_softmax(-1)
    with patched(model, learned.layers):
        ours = model(tokens[None]).logits.log_softmax(-1)
    return float(F.kl_div(ours, wanted, reduction="sum", log_target=True)) / len(tokens)


def test_cut_off_it_goes_on_to_the_same_weights(setting, tmp_path):
    model, learned, parts = setting
    whole, _ = recovered(of(model, parts), learned, [float("inf")], rank=2, n_steps=4)

    def cut(stage, done, total, seconds):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(of(model, parts, Stages(tmp_path, "x", cut, 0.0)), learned, [float("inf")], rank=2, n_steps=4)
    resumed, losses = recovered(
        of(model, parts, Stages(tmp_path, "x", None)), learned, [float("inf")], rank=2, n_steps=4
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(losses) == 4
    assert not torch.tensor(losses).isnan().any()


def test_without_text_to_learn_from_it_says_so(setting):
    model, learned, _ = setting
    with pytest.raises(ConsolidationError, match="give more text"):
        recovered(of(model, {"learning": [], "further": []}), learned, [0.0], rank=2, n_steps=4)
