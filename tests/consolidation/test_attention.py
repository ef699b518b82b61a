"""The patch: bit-equal when closed, equal to masked dense attention when open, in one pass and token by token."""

import copy

import pytest
import torch
from families import BUILD, GPT2_SIZES, GROUPED, build, documents
from patches import EVERYTHING, N_SINKS, NAMES, NOTHING, WINDOW, at, layers_for, model_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from cramlab.consolidation.patch.growing_cache import GrowingLayer
from cramlab.consolidation.patch.install import closed, consolidatable_sites, install, installed, patched, remove
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import UnknownFamilyError, attention_sites


def tokens_of(n_batch=2, n_tokens=40):
    return torch.stack(documents(n_batch, n_tokens))


@pytest.mark.parametrize("name", NAMES)
def test_closed_removed_or_reading_all_is_the_original(name):
    model = model_of(name)
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        plain, masked = model(tokens).logits, model(tokens, attention_mask=mask).logits
        original = copy.deepcopy(model.state_dict())
        install(model, layers_for(model))
        opened = model(tokens).logits
        assert not torch.equal(opened, plain)
        with closed(model):
            assert torch.equal(model(tokens).logits, plain)
            assert torch.equal(model(tokens, attention_mask=mask).logits[mask.bool()], masked[mask.bool()])
        assert torch.equal(model(tokens).logits, opened)
        remove(model)
        with patched(model, at(layers_for(model), EVERYTHING)):
            torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-3, atol=1e-4)
            short = tokens[:, : WINDOW + N_SINKS]
            assert torch.equal(model(short).logits, model_of(name)(short).logits)
        assert torch.equal(model(tokens).logits, plain)
    assert not installed(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


def by_dense_masks(model, layers, tokens, mask):
    """Logits and reads of the reference: every token scored against every key in eager attention, under masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    layers_by_module = {site.attention: layers[site.layer] for site in attention_sites(model)}
    seen, extra, reads_of = {}, {}, {}

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        layer = layers_by_module[module]
        n = tokens.shape[1]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        first = (mask.cumsum(1) == 0).sum(1)
        place, own = torch.arange(n)[None, None], torch.arange(n)[None, :, None]
        real = (place >= first[:, None, None]) & (place <= own)
        sinks = real & (place < first[:, None, None] + layer.n_sinks)
        near = real & ~sinks & (place > own - layer.window)
        far_keys = real & ~sinks & ~near
        far = far_keys.any(-1)
        full, window = (
            (scores.masked_fill(~ok[:, None], -1e30).softmax(-1) @ value).transpose(1, 2) for ok in (real, sinks | near)
        )
        masses = [scores.masked_fill(~ok[:, None], -1e30).logsumexp(-1).clamp(min=-50).transpose(1, 2)
                  for ok in (near, sinks)]  # fmt: skip
        features = torch.cat([seen[module], window.flatten(2), *masses], dim=-1)
        reads = (layer.scores(features, real.sum(-1)) > 0) & far
        reads_of[module] = int(reads.sum())
        extra[module] = torch.where((far & ~reads)[..., None], layer.adapt(features), 0.0)
        return torch.where(reads[..., None, None] | ~far[..., None, None], full, window), None

    AttentionInterface.register("slow-twin", attention)
    AttentionMaskInterface.register("slow-twin", eager_mask)
    handles = []
    for site in attention_sites(model):

        def before(module, args, kwargs):
            seen[module] = args[0] if args else kwargs["hidden_states"]

        handles.append(site.attention.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(site.out_proj.register_forward_hook(lambda _, __, out, m=site.attention: out + extra[m]))
    model.set_attn_implementation("slow-twin")
    logits = model(tokens, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return logits, list(reads_of.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_padding", [0, 3])
def test_outputs_and_gradients_are_those_of_masked_dense_attention(name, n_padding):
    model = model_of(name)
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    mask[0, :n_padding] = 0
    real = mask.bool()
    layers = layers_for(model)
    wanted, n_reads = by_dense_masks(model, layers, tokens, mask)
    given = [
        p for layer in layers.values() for n, p in layer.named_parameters() if not n.startswith(("gate", "offsets"))
    ]
    given.append(model.get_input_embeddings().weight)
    direction = torch.randn(wanted[real].shape)
    wanted_grads = torch.autograd.grad((wanted[real] * direction).sum(), given)
    with patched(model, layers):
        got = model(tokens, attention_mask=mask).logits
        grads = torch.autograd.grad((got[real] * direction).sum(), given)
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))
    assert [layer.counts.far_reads for layer in layers.values()] == n_reads
    n_far = 40 * 2 - n_padding - 2 * (WINDOW + N_SINKS)
    for layer in layers.values():
        assert 0 < layer.counts.far_reads < layer.counts.far_tokens == n_far  # both paths were walked


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_with_the_cache_is_the_same(name):
    model = model_of(name)
    tokens = tokens_of()
    with torch.no_grad(), patched(model, layers_for(model)):
        whole = model(tokens).logits
        whole_reads = [layer.counts.far_reads for layer in installed(model).values()]
        for layer in installed(model).values():
            layer.tally.reset()
        cache, parts = DynamicCache(config=model.config), []
        for chunk in (tokens[:, :7], tokens[:, 7:20], *tokens[:, 20:].split(1, dim=1)):
            parts.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)
        assert all(type(layer) is GrowingLayer for layer in cache.layers)
        assert [layer.counts.far_reads for layer in installed(model).values()] == whole_reads


def test_a_skipping_token_does_not_touch_the_far_part_of_the_cache():
    model = model_of("llama")
    tokens = tokens_of(1, 40)
    with torch.no_grad(), patched(model, at(layers_for(model), NOTHING)):
        cache = DynamicCache(config=model.config)
        model(tokens[:, :30], past_key_values=cache, use_cache=True)
        held = copy.deepcopy(cache)
        wanted = model(tokens[:, 30:31], past_key_values=held, use_cache=True).logits
        places = []
        for layer in cache.layers:
            layer.keys[:, :, N_SINKS : 30 - WINDOW] = torch.nan
            layer.values[:, :, N_SINKS : 30 - WINDOW] = torch.nan
            places.append(layer.keys.data_ptr())
        got = model(tokens[:, 30:31], past_key_values=cache, use_cache=True).logits
        assert torch.equal(got, wanted)
        assert places == [layer.keys.data_ptr() for layer in cache.layers]  # and it was not copied


@pytest.mark.parametrize("kind", [{}, {"num_beams": 2}])
def test_generate_works_and_an_open_gate_generates_what_the_original_does(kind):
    model = model_of("llama")
    prompt, mask = tokens_of(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, **kind}
    wanted = model.generate(prompt, **options)
    with patched(model, at(layers_for(model), EVERYTHING)):
        assert torch.equal(model.generate(prompt, **options), wanted)
    with patched(model, at(layers_for(model), NOTHING)):
        assert model.generate(prompt, **options).shape == wanted.shape


def test_pairs_are_counted_as_executed():
    model = model_of("llama")
    layers = at(layers_for(model), NOTHING)
    with torch.no_grad(), patched(model, layers):
        model(tokens_of(2, 40))
        for layer in layers.values():
            assert layer.counts.far_pairs == layer.counts.far_reads == 0
            assert layer.counts.skipped_frac == 1
            assert layer.counts.causal_pairs == 2 * 40 * 41 // 2
            assert layer.counts.window_pairs == 2 * 42 * (6 + 6 - 1 + 2)  # seven blocks of six queries
    layers = at(layers, EVERYTHING)
    with torch.no_grad(), patched(model, layers):
        model(tokens_of(2, 40))
        for layer in layers.values():
            assert layer.counts.far_reads == 2 * (40 - WINDOW - N_SINKS)
            assert layer.counts.far_pairs == 2 * 32 * 40  # one block of readers, up to its last


@pytest.mark.parametrize("reads", ["none", "some", "all"])
def test_pairs_are_those_that_the_flop_counter_of_the_cram_layer_counts(reads):
    """What a patch adds to a model without attention: two products over every pair in each head, gate and adapter."""
    model, tokens = model_of("llama"), tokens_of(1, 40)
    layers = at(layers_for(model), {"none": NOTHING, "some": 0.0, "all": EVERYTHING}[reads])

    def counted(window_only):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if window_only:
                model(tokens[:, :1])
            else:
                with patched(model, layers):
                    model(tokens)
        return counter.get_total_flops()

    flops = counted(window_only=False)
    per_token = counted(window_only=True)  # of a single token: maps, and one pair in each head
    (config,) = {(layer.rank, layer.shift.numel(), site.n_heads, site.d_head, site.d_model)
                 for layer, site in zip(layers.values(), attention_sites(model), strict=True)}  # fmt: skip
    rank, n_features, n_heads, d_head, d_model = config
    pair = 2 * 2 * n_heads * d_head
    attention = flops - 40 * (per_token - len(layers) * pair)
    looked = 2 * 40 * n_features * (rank + 1)  # the code and the score, for every token
    answered = 0 if reads == "all" else 2 * 40 * rank * d_model
    pairs = sum(layer.counts.window_pairs + layer.counts.far_pairs for layer in layers.values())
    assert attention == pair * pairs + len(layers) * (looked + answered)


def test_keys_that_nobody_can_ask_for_are_counted():
    model = model_of("llama")
    layers = layers_for(model)
    layers[1] = layers[1].at(NOTHING)
    with torch.no_grad(), patched(model, layers):
        cache = DynamicCache(config=model.config)
        for part in tokens_of(2, 40).split([30, 5, *[1] * 5], dim=1):
            model(part, past_key_values=cache, use_cache=True)
        assert [layer.counts.unreachable for layer in layers.values()] == [0, 2 * (40 - WINDOW - N_SINKS), 0]
        for entries in (cache.layers[1].keys, cache.layers[1].values):  # as many are never looked at again
            entries[:, :, N_SINKS : 40 - WINDOW] = torch.nan
        assert not model(tokens_of(2, 1), past_key_values=cache, use_cache=True).logits.isnan().any()


def test_a_harness_that_pads_on_the_right_and_gives_no_mask_gets_what_single_texts_give():
    model = model_of("llama")
    texts = [tokens[:n] for tokens, n in zip(documents(3, 40), (40, 31, 12), strict=True)]
    batch = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    with torch.no_grad(), patched(model, layers_for(model)):
        together = model(batch).logits
        for row, text in zip(together, texts, strict=True):
            torch.testing.assert_close(row[: len(text)], model(text[None]).logits[0], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_patched_is_refused_with_the_reason():
    torch.manual_seed(0)
    with pytest.raises(ConsolidationError, match="sliding window of 8"):
        consolidatable_sites(build("mistral"))
    with pytest.raises(ConsolidationError, match="not a causal language model"):
        consolidatable_sites(build("bert"))
    with pytest.raises(UnknownFamilyError, match="no language model"):
        consolidatable_sites(nn.Linear(2, 2))
    with pytest.raises(UnknownFamilyError, match="AttentionInterface"):
        consolidatable_sites(build("cram_gpt2"))
    model = model_of("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConsolidationError, match='"flex_attention" attention'):
        install(model, layers_for(model))
    model.config._attn_implementation = "sdpa"
    model.config.is_causal = False
    with pytest.raises(ConsolidationError, match="lets tokens see later ones"):
        consolidatable_sites(model)
    model = model_of("llama")
    with pytest.raises(ConsolidationError, match="at least one"):
        install(model, {})
    with patched(model, layers_for(model)), pytest.raises(ConsolidationError, match="patched already"):
        install(model, layers_for(model))
    with pytest.raises(ConsolidationError, match=r"layers \[7\]"):
        install(model, {7: layers_for(model)[0]})
    with pytest.raises(ValueError, match=r"window = 0"):
        layers_for(model, window=0)


def test_layers_that_see_a_window_already_are_left_alone():
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, layer_types=types)
    assert [site.layer for site in consolidatable_sites(Qwen2ForCausalLM(config))] == [0, 2]


def test_dropout_is_refused():
    model = BUILD["gpt2"]()
    assert GPT2_SIZES["n_layer"] == 3
    with patched(model, layers_for(model)):
        model.train()
        with pytest.raises(ConsolidationError, match="dropout"):
            model(tokens_of())
