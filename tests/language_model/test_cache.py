import copy
import pickle
from unittest import mock

import pytest
import torch
from tiny_cram import ids, make
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

HOW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["plain", "of the config"])
def test_an_empty_ordinary_cache_is_filled_in_place(kind):
    model, tokens = make(), ids()
    given = DynamicCache() if kind == "plain" else DynamicCache(config=model.config)
    whole = model(tokens).logits
    with torch.no_grad():
        assert model(tokens[:, :15], past_key_values=given, use_cache=True).past_key_values is given
        assert given.get_seq_length() == 15
        for t in range(15, 20):
            step = model(tokens[:, t : t + 1], past_key_values=given).logits
            torch.testing.assert_close(step, whole[:, t : t + 1], atol=1e-4, rtol=1e-4)
    generated = model.generate(tokens, past_key_values=DynamicCache(), **HOW)
    assert torch.equal(generated, model.generate(tokens, **HOW))


def test_generation_goes_on_from_a_cache_that_it_filled():
    model, tokens = make(), ids(2, 9)
    given = DynamicCache()
    first = model.generate(tokens, past_key_values=given, **HOW)
    longer = torch.cat([first, ids(2, 4)], dim=1)
    assert torch.equal(model.generate(longer, past_key_values=given, **HOW), model.generate(longer, **HOW))
    in_parts = model.generate(longer, prefill_chunk_size=4, **HOW)
    assert torch.equal(in_parts, model.generate(longer, **HOW))


def filled():
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 5, 16), torch.zeros(3, 2, 5, 16), 0)
    return cache


def offloading():
    """A cache that offloads, also where torch was built for CUDA and there is no card to make a stream on."""
    with mock.patch.object(torch, "Stream"):
        return DynamicCache(offloading=True)


FOREIGN = {
    "StaticCache, which cannot hold": lambda model: StaticCache(config=model.config, max_cache_len=30),
    "DynamicCache that offloads": lambda model: offloading(),
    "DynamicCache that another model has filled": lambda model: filled(),
    "tuple, which cannot hold": lambda model: ((torch.zeros(3, 2, 5, 16),) * 2,) * 2,
    "holds the state of another model": lambda model: make()(ids(), use_cache=True).past_key_values,
    "holds 2 sequences, but the input has 3": lambda model: model(ids(2), use_cache=True).past_key_values,
}


@pytest.mark.parametrize("words", FOREIGN)
def test_a_cache_that_cannot_be_gone_on_from_is_refused(words):
    model = make()
    with pytest.raises(ValueError, match=words):
        model(ids(), past_key_values=FOREIGN[words](model))


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_a_kind_of_cache_that_cannot_hold_the_state_is_refused_before_generating(kind):
    model = make()
    model.embed_tokens = None  # nothing may run
    with pytest.raises(ValueError, match=f'cache_implementation = "{kind}"'):
        model.generate(ids(), cache_implementation=kind, **HOW)


def test_the_default_kind_of_cache_may_be_named():
    model, tokens = make(), ids()
    assert torch.equal(model.generate(tokens, cache_implementation="dynamic", **HOW), model.generate(tokens, **HOW))


def test_a_quantized_cache_is_refused():
    pytest.importorskip("optimum.quanto")
    model = make()
    with pytest.raises(ValueError, match="QuantizedCache"):
        model(ids(), past_key_values=QuantizedCache("quanto", model.config))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_cache_goes_on_by_itself_and_holds_no_weights(way):
    model, tokens = make(), ids()
    whole = model(tokens).logits
    with torch.no_grad():
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        model(tokens[:, 10:11], past_key_values=cache)
        other = copy.deepcopy(cache) if way == "deepcopy" else pickle.loads(pickle.dumps(cache))
        assert len(pickle.dumps(cache)) < sum(p.numel() * 4 for p in model.parameters())
        for given in (other, cache):
            for t in range(11, 20):
                step = model(tokens[:, t : t + 1], past_key_values=given).logits
                torch.testing.assert_close(step, whole[:, t : t + 1], atol=1e-4, rtol=1e-4)


def test_what_was_read_cannot_be_hidden_afterwards():
    model, tokens = make(), ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = mask[1, 4:6] = 0
    whole = model(tokens, attention_mask=mask).logits
    cache = model(tokens[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    other = mask.clone()
    other[0, 5] = 0
    for wrong in (other, torch.ones_like(mask)):
        with pytest.raises(ValueError, match="cannot forget tokens"):
            model(tokens[:, 8:], past_key_values=cache, attention_mask=wrong)
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = model(tokens.flip(0)[:, 8:], past_key_values=cache, attention_mask=mask.flip(0)).logits
    torch.testing.assert_close(rest.flip(0), whole[:, 8:], atol=1e-4, rtol=1e-4)


def test_what_is_hung_on_a_mixer_sees_every_step():
    model, tokens, seen = make(), ids(), []
    hook = model.layers[1].mixer.register_forward_hook(lambda *args: seen.append(args[-1].trace.scored.shape))
    with torch.no_grad():
        cache = model(tokens[:, :18], use_cache=True).past_key_values
        watched = model(tokens[:, 18:19], past_key_values=cache).logits
        hook.remove()
        assert seen == [(3, 18), (3, 1)]
        torch.testing.assert_close(watched, model(tokens).logits[:, 18:19], atol=1e-4, rtol=1e-4)


def test_an_empty_cache_of_a_model_serves_another():
    model, tokens = make(), ids()
    cache = make(num_hidden_layers=3)(tokens, use_cache=True).past_key_values
    cache.reset()
    assert torch.equal(model(tokens, past_key_values=cache).logits, model(tokens).logits)
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == 20
