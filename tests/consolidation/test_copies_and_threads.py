"""A forward pass leaves nothing on a model: threads get their own answers, and copies are the same model."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import build
from tiny_cram import ids, make

from cramlab.hf.loading import reading_all

MODELS = {
    "cram": lambda: make(memory_write="salience"),
    "cram_gpt2": lambda: build("cram_gpt2"),
}


def everything_on(model):
    """All attributes of all modules but hooks, parameters and children, as text."""
    return {
        name: repr(sorted((k, repr(v)) for k, v in vars(m).items() if k[0] != "_")) for name, m in model.named_modules()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_leaves_nothing_on_the_model(name):
    model, tokens = MODELS[name](), ids()
    before = everything_on(model)
    model(tokens, labels=tokens).loss.backward()
    with reading_all(model):
        model(tokens)
    model.generate(tokens, max_new_tokens=3, pad_token_id=0)
    assert everything_on(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_each_of_four_threads_gets_its_own_answer(name):
    model = MODELS[name]()
    texts = [ids(1, 10 + n) for n in range(4)]
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def ask(text):
        with torch.no_grad():
            return model(text).logits, model.generate(text, **how)

    alone = [ask(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for (logits, text), (expected, other) in zip(pool.map(ask, texts), alone, strict=True):
                assert torch.equal(logits, expected)
                assert torch.equal(text, other)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_a_copy_is_the_same_model_and_another_object(name, way):
    model, tokens = MODELS[name](), ids()
    answer = model(tokens).logits
    other = way(model)
    assert torch.equal(other(tokens).logits, answer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens).logits, answer)
