"""A patch is proven on the spot: each fault that a proof is for is found, and named with its layer."""

import contextlib
import copy

import pytest
import torch
from families import build
from patches import layers_for, model_of
from torch import nn

import reproduction.decoders as decoders
from cramlab.consolidation.patch import attach, calls, prove, reads
from cramlab.consolidation.patch.install import consolidatable_sites, installed, patched
from cramlab.consolidation.patch.observe import added_by_far, observe
from cramlab.consolidation.patch.sites import left_alone
from cramlab.consolidation.rules.baselines import WindowOnly
from cramlab.errors import ConsolidationError


def halved(function):
    """The function with its first output halved."""

    def other(*args, **kwargs):
        output = function(*args, **kwargs)
        return output._replace(heads=output.heads / 2) if hasattr(output, "heads") else (output[0] / 2, *output[1:])

    return other


def ignoring(*_, **__):
    """A mask that is taken to hide nothing."""


FAULTS = {
    "closed": (prove, "closed", lambda _: contextlib.nullcontext, "layer 0 the output of a closed patch differs"),
    "far": (calls, "far_read", halved, "layer 0 the output of a patch whose reads are all made differs"),
    "window": (calls, "window_read", halved, "layer 0 the output of a patch whose reads are all made differs"),
    "cache": (reads, "_one_token", halved, "layer 0 the output of a patch with a cache differs"),
    "padding": (calls, "visibility", lambda _: ignoring, "layer 0 the output of a patch behind padding differs"),
    "error": (calls, "let_grow", lambda _: None, "a patch with a cache ends in TypeError"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_patch_that_is_wrong_is_refused(name, monkeypatch):
    where, what, fault, message = FAULTS[name]
    model = model_of("llama")
    monkeypatch.setattr(where, what, fault(getattr(where, what)))
    with pytest.raises(ConsolidationError, match=f"LlamaForCausalLM cannot be patched: .*{message}"):
        consolidatable_sites(model)
    assert not installed(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    assert len(consolidatable_sites(model)) == 3


def test_a_model_is_proven_once_and_again_when_it_has_changed(monkeypatch):
    model, proven = model_of("llama"), []
    monkeypatch.setattr("cramlab.consolidation.patch.sites.prove", lambda *_: proven.append(1))
    for n_proofs, change in (
        (1, lambda: None),
        (1, lambda: None),
        (2, lambda: model.set_attn_implementation("eager")),
        (3, lambda: setattr(model.model.layers[1].self_attn, "o_proj", nn.Linear(24, 24))),
    ):
        change()
        consolidatable_sites(model)
        assert len(proven) == n_proofs


def test_a_patched_model_has_the_sites_that_were_proven_before():
    model = model_of("llama")
    sites = consolidatable_sites(model)
    with patched(model, layers_for(model)):
        assert consolidatable_sites(model) == sites
        with pytest.raises(ConsolidationError, match="patched already"):
            consolidatable_sites(copy.deepcopy(model))


def test_a_proof_leaves_the_model_as_it_was():
    model = build("gpt2").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    consolidatable_sites(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_half_precision_is_proven_within_its_own_rounding():
    assert len(consolidatable_sites(model_of("llama").to(torch.bfloat16))) == 3


def test_why_layers_are_left_alone():
    assert left_alone(decoders.build("gemma2")) == {
        0: "attends to a sliding window of 8 tokens only", 2: "attends to a sliding window of 8 tokens only",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_next", "bitnet", "diffllama", "gpt_oss", "llama"])
def test_what_far_reads_add_is_the_difference_of_two_passes(name):
    """Also where a gate, a norm or a difference of two attentions stands between heads and projection."""
    model = decoders.build(name)
    tokens = torch.arange(2, 22)[None]
    site = consolidatable_sites(model)[0]
    assert site.direct == (name in ("gpt_oss", "llama"))
    near, added, outputs = {"window": 4, "n_sinks": 1}, [], []

    def look(_, seen):
        added.extend([added_by_far(site, seen), seen.added, added_by_far(site, seen, (0, [7, 9]))])

    handle = site.out_proj.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        attach.base_model(model)(input_ids=tokens, use_cache=False)
        with patched(model, {site.layer: WindowOnly(**near)}):
            attach.base_model(model)(input_ids=tokens, use_cache=False)
        handle.remove()
        observe(model, [site], tokens, look, **near)
    wanted = outputs[0] - outputs[1]
    assert wanted[:, 5:].abs().min() > 0
    for got, other in zip(added, (wanted, wanted, wanted[0, [7, 9]]), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
