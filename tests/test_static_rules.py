"""Static baselines as they are timed say what their twins say that show the loss."""

from pathlib import Path

import pytest
import torch
from families import build, documents
from torch import nn
from transformers import DynamicCache

from cramlab.hf.attention_sites import attention_sites
from cramlab.hf.consolidated import install, patched
from cramlab.retrofit import baselines

WINDOW, N_SINKS = 6, 2


@pytest.fixture
def static_rules(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import static_rules

    return static_rules


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("frac", [0.0, 4 / 9, 1.0])
def test_split_heads_in_one_pass_and_with_a_cache(static_rules, family, frac):
    model, tokens = build(family), torch.stack(documents(2, 40))
    sites = attention_sites(model)
    importance = torch.rand(3, 3)
    windowed = torch.zeros(9, dtype=torch.bool)
    windowed[importance.flatten().argsort()[: round(9 * frac)]] = True
    with torch.no_grad():
        with patched(model, baselines.static_heads(sites, importance, frac, WINDOW, N_SINKS)):
            wanted = model(tokens).logits
        install(model, static_rules.split_heads(sites, windowed.view(3, 3), WINDOW, N_SINKS))
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-3, atol=1e-4)
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([20, 18, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("linear", [False, True])
def test_whole_sub_layers(static_rules, family, linear):
    model, tokens = build(family), torch.stack(documents(2, 40))
    sites = attention_sites(model)
    instead = nn.Linear(sites[1].d_model, sites[1].d_model) if linear else None
    maps = [lambda hidden: instead(hidden)] * 3 if linear else None
    with torch.no_grad():
        with patched(model, baselines.dropped(sites, [1], WINDOW, N_SINKS, maps)):
            wanted = model(tokens).logits
        static_rules.replace(model, sites[1], static_rules.Instead(instead))
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-3, atol=1e-4)
