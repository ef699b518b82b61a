import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from families import BUILD, build, documents
from tiny_cram import ids, make
from torch import nn

from cramlab.auditing.capture import watching
from cramlab.hf.attention_sites import (
    DECLARED,
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


def test_every_declared_model_is_here():
    assert set(DECLARED) - {"planted"} <= set(BUILD)


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


def test_what_is_no_language_model_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(UnknownFamilyError, match=r"Linear has no config\.vocab_size"):
        attention_sites(model)
    model.config = SimpleNamespace(vocab_size=9)
    with pytest.raises(UnknownFamilyError, match="Linear does not run on tokens alone"):
        attention_sites(model)


def test_a_projection_that_was_replaced_is_found_again():
    model = build("llama")
    before = attention_sites(model)
    assert [site.out_proj for site in before] == [site.out_proj for site in attention_sites(model)]
    new = model.model.layers[1].self_attn.o_proj = nn.Linear(24, 24, bias=False)
    assert attention_sites(model)[1].out_proj is new


def test_finding_leaves_nothing_behind():
    """Neither a hook nor another mode; and a model that nobody else holds is freed."""
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    attention_sites(model)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_layers_of_a_cram_model_without_memories_are_no_sites():
    sites, seen = seen_in(make(num_hidden_layers=3, memory_layers=[0, 2], memory_capacity=None), ids())
    assert [site.layer for site in sites] == [0, 2]
    assert list(seen) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 4}, "config.window = 4 runs the modules"),
        ({"memory_layers": []}, "no block of this CRAMForCausalLM"),
    ],
)
def test_what_hooks_cannot_see_is_refused(changes, message):
    with pytest.raises(UnknownFamilyError, match=message):
        attention_sites(make(**changes))
