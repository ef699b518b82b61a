from types import SimpleNamespace

import pytest
import torch
from families import BUILD, build, documents
from tiny_cram import ids, make
from torch import nn

from cramlab.auditing.capture import watching
from cramlab.hf.attention_sites import (
    FAMILIES,
    Family,
    UnknownFamilyError,
    affine_map,
    attention_sites,
    base_model,
)
from cramlab.hf.loading import reading_all


def seen_in(model, tokens):
    seen = {}
    sites = attention_sites(model)
    with torch.no_grad(), reading_all(model), watching(sites, lambda i, s: seen.setdefault(i, s)):
        base_model(model)(input_ids=tokens)
    return sites, seen


def test_every_family_has_a_model_here():
    assert set(BUILD) == set(FAMILIES) - {"planted"}


@pytest.mark.parametrize("name", BUILD)
def test_sites_hold_what_their_names_say(name):
    model = build(name)
    tokens = torch.stack(documents(2, 12))
    sites, seen = seen_in(model, tokens)
    assert [site.layer for site in sites] == [0, 1, 2] == list(seen)
    for site, s in zip(sites, seen.values(), strict=True):
        assert s.hidden.shape == s.stream.shape == s.answer.shape == (24, site.d_model)
        assert s.heads.shape == (24, site.n_heads * site.d_head)
        if site.norm is not None:
            torch.testing.assert_close(site.norm(s.stream), s.hidden)
        weight, bias = affine_map(site)
        torch.testing.assert_close((s.heads.double() @ weight + bias).float(), s.answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_the_answer_is_what_the_block_adds(name):
    """Stream plus answer, through the MLP's half, is the next stream: nothing of attention is missed."""
    model = build(name)
    sites, seen = seen_in(model, torch.stack(documents(1, 12)))
    block = sites[0].block
    middle = seen[0].stream + seen[0].answer
    norm, mlp = (block.ln_2, block.mlp) if name == "gpt2" else (block.post_attention_layernorm, block.mlp)
    torch.testing.assert_close(middle + mlp(norm(middle)), seen[1].stream)


def test_heads_are_told_apart():
    """Silencing a head's values silences its columns and no others."""
    model = build("gpt2")
    tokens = torch.stack(documents(1, 12))
    site = attention_sites(model)[0]
    with torch.no_grad():  # the values of head 1, which are the last third of c_attn's output
        start = 2 * 24 + site.d_head
        site.attention.c_attn.weight[:, start : start + site.d_head] = 0.0
        site.attention.c_attn.bias[start : start + site.d_head] = 0.0
    _, seen = seen_in(model, tokens)
    silent = (seen[0].heads.view(-1, site.n_heads, site.d_head).abs().sum(dim=(0, 2)) == 0).tolist()
    assert silent == [False, True, False]


def test_an_unknown_family_is_refused_with_the_way_to_add_it():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="lama")
    with pytest.raises(UnknownFamilyError, match=r'"lama".*did you mean "llama".*FAMILIES in cramlab/hf/attention'):
        attention_sites(model)
    with pytest.raises(UnknownFamilyError, match='"None"'):
        attention_sites(nn.Linear(2, 2))


def test_an_entry_that_does_not_fit_is_refused(monkeypatch):
    wrong = Family(blocks="h", norm="ln_1", attention="attn", out_proj="attn.o_proj")
    monkeypatch.setitem(FAMILIES, "gpt2", wrong)
    with pytest.raises(UnknownFamilyError, match=r"lacks a module.*o_proj"):
        attention_sites(build("gpt2"))


def test_layers_of_a_cram_model_without_memories_are_no_sites():
    sites, seen = seen_in(make(num_hidden_layers=3, memory_layers=[0, 2], memory_capacity=None), ids())
    assert [site.layer for site in sites] == [0, 2]
    assert list(seen) == [0, 1]
