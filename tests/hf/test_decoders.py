"""Tiny models of some hundred decoder types: each is taken, or refused for the reason in `reproduction.decoders`."""

import pytest
import torch
from families import documents
from patches import at, layers_for

from cramlab.auditing.capture import watching
from cramlab.consolidation.patch.install import closed, consolidatable_sites, patched
from cramlab.hf.attention_sites import affine_map, attention_sites
from cramlab.hf.structure import base_model, hidden_states
from reproduction.decoders import DECODERS, REASONS, build

N = 20
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
# Those tried by `make test`; `make slow` tries the others, which are built like one of these.
CORE = [
    "afmoe", "apertus", "arcee", "bamba", "bert", "biogpt", "bitnet", "bloom", "codegen", "cohere", "dbrx",
    "deepseek_v3", "deepseek_v32", "diffllama", "doge", "ernie4_5", "exaone4", "falcon", "gemma2",
    "gemma3_text", "gemma3n_text", "glm", "glm4", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite",
    "helium", "hrm_text", "hunyuan_v1_dense", "jamba", "jetmoe", "lfm2", "llama", "llama4_text", "mamba",
    "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "xglm", "xlnet",
]  # fmt: skip
NAMES = [pytest.param(name, marks=[] if name in CORE else pytest.mark.slow) for name in DECODERS]


def tokens_of():
    return torch.stack(documents(2, N))


def passed(model, tokens, cache, positions):
    """Output of a pass with a cache, (B, T, D), and the cache."""
    try:
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, position_ids=positions)
    except TypeError:  # OPT, BioGPT and others count by themselves
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return output.last_hidden_state, output.past_key_values


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_taken_or_refused_for_the_reason(name):
    model, wanted = build(name), DECODERS[name]
    for find, layers in ((attention_sites, wanted.audited), (consolidatable_sites, wanted.patched)):
        if isinstance(layers, str):
            with pytest.raises(ValueError, match=REASONS[layers]):
                find(model)
        else:
            assert tuple(site.layer for site in find(model)) == layers
    if isinstance(wanted.audited, tuple):
        tokens, seen = tokens_of(), {}
        sites = attention_sites(model)
        with torch.no_grad(), watching(sites, seen.__setitem__):
            hidden_states(model, tokens)
        assert list(seen) == list(range(len(sites)))
        for site, s in zip(sites, seen.values(), strict=True):
            weight, bias = affine_map(site)
            torch.testing.assert_close((s.heads.double() @ weight + bias).float(), s.answer, **CLOSE)
            if site.norm is not None:
                torch.testing.assert_close(site.norm(s.stream[None])[0], s.hidden, **CLOSE)
    if isinstance(wanted.patched, tuple):
        tokens, base = tokens_of(), base_model(model)
        layers = layers_for(model)
        with torch.no_grad(), patched(model, layers):
            whole = base(input_ids=tokens, use_cache=False).last_hidden_state
            done, cache, begun = [], None, 0
            for part in tokens.split([17, 1, 1, 1], dim=1):
                positions = torch.arange(begun, begun + part.shape[1])[None].expand(2, -1)
                hidden, cache = passed(base, part, cache, positions)
                done.append(hidden)
                begun += part.shape[1]
            torch.testing.assert_close(torch.cat(done, dim=1), whole, **CLOSE)
            with closed(model):
                shut = hidden_states(model, tokens)
        reads, far = (sum(getattr(x.counts, n) for x in layers.values()) for n in ("far_reads", "far_tokens"))
        assert 0 < reads < far
        with torch.no_grad():
            assert torch.equal(shut, hidden_states(model, tokens))
            with patched(model, at(layers, -float("inf"))):
                torch.testing.assert_close(hidden_states(model, tokens), shut, **CLOSE)
