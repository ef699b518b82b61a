"""A patched model in other hands: threads, copies, files, caches, adapters, training."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import transformers
from families import documents
from patches import EVERYTHING, N_SINKS, NAMES, WINDOW, at, layers_for, model_of
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import DynamicCache

from cramlab.consolidation.patch.calls import _stacks
from cramlab.consolidation.patch.growing_cache import GrowingLayer, let_grow
from cramlab.consolidation.patch.install import closed, consolidatable_sites, install, installed, patched, remove
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.errors import ConsolidationError

N = 40
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def tokens_of(n_batch=2, n_tokens=N, seed=0):
    return torch.stack(documents(n_batch, n_tokens, seed=seed))


@pytest.fixture
def model():
    model = model_of("llama")
    install(model, layers_for(model))
    return model


def traces(model):
    """Everything that a module holds, by its identity and, for tensors, by its numbers."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = value.items() if isinstance(value, dict) else [("", value)]
            for k, v in inside:
                found[name, key, k] = (id(v), v._version if isinstance(v, torch.Tensor) else None)
    return found


def test_a_forward_pass_writes_nothing_to_the_model(model):
    with torch.no_grad():
        model(tokens_of())
        before = traces(model)
        model(tokens_of(), attention_mask=torch.ones(2, N, dtype=torch.int64))
        model.generate(tokens_of()[:, :20], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert traces(model) == before
    assert not _stacks.calls
    assert not _stacks.passes


def test_a_call_that_fails_leaves_nothing_behind(model):
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens_of())
    handle.remove()
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens_of())
    handle.remove()
    assert not _stacks.calls
    assert not _stacks.passes


def test_any_number_of_threads_ask_one_model(model):
    """Each with its own text, mask and cache; one of them has the patch closed, which is nobody else's business."""
    asked = [tokens_of(1 + k % 2, N + k, seed=k) for k in range(6)]
    masks = [torch.ones_like(tokens) for tokens in asked]
    for k, mask in enumerate(masks):
        mask[0, : 2 * k] = 0
    answers: list[list[torch.Tensor]] = [[] for _ in asked]

    def ask(k):
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(4):
                cache = DynamicCache(config=model.config)
                first = model(asked[k][:, :30], attention_mask=masks[k][:, :30], past_key_values=cache).logits
                rest = model(asked[k][:, 30:], attention_mask=masks[k], past_key_values=cache).logits
                answers[k].append(torch.cat([first, rest], dim=1))

    for k in range(len(asked)):
        ask(k)
    wanted = [found.pop() for found in answers]
    for found in answers:
        found.clear()
    before = sum(layer.counts.tokens for layer in installed(model).values())
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(asked))]
    with closed(model):  # of this thread
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for found, want in zip(answers, wanted, strict=True):
        assert len(found) == 4
        assert all(torch.equal(one, want) for one in found)
    done = sum(layer.counts.tokens for layer in installed(model).values()) - before
    assert done == 4 * 3 * sum(tokens.numel() for tokens in asked)  # no count is lost


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_answer_alike_with_parts_of_their_own(model, way):
    tokens = tokens_of()
    with torch.no_grad():
        wanted = model(tokens).logits
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        before = [layer.counts for layer in installed(model).values()]
        assert torch.equal(other(tokens).logits, wanted)
        assert [layer.counts for layer in installed(model).values()] == before
        assert all(layer.counts.tokens == tokens.numel() for layer in installed(other).values())
        for layer in installed(other).values():
            layer.gate.bias.add_(100.0)
        assert torch.equal(model(tokens).logits, wanted)
        assert not torch.equal(other(tokens).logits, wanted)
        remove(other)
        assert not installed(other)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
        assert torch.equal(other(tokens).logits, model_of("llama")(tokens).logits)
        assert torch.equal(model(tokens).logits, wanted)


def test_the_state_of_a_patched_model_is_that_of_the_original(model, tmp_path):
    plain = model_of("llama")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    layer = installed(model)["model.layers.0.self_attn"]
    own = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert {"down.weight", "up.bias", "gate.weight", "shift"} <= own.keys()
    assert not layer.load_state_dict(own).missing_keys
    others = torch.nn.ModuleDict({str(i): one for i, one in layers_for(plain).items()})
    assert "0.gate.weight" in others.state_dict()  # at no model, they are modules like others
    with pytest.raises(RuntimeError, match=r"gate\.bias"):
        layer.load_state_dict({name: tensor for name, tensor in own.items() if name != "gate.bias"})
    with pytest.warns(UserWarning, match="without the patch"):
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "consolidated" in key]  # noqa: SIM118
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(again(tokens_of()).logits, plain(tokens_of()).logits)


@pytest.mark.parametrize("cache", ["static", "dynamic", "quantized"])
def test_every_cache_of_transformers_generates_the_same(cache):
    model, prompt = model_of("llama"), tokens_of(2, 20)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    kind = {"cache_implementation": cache, "disable_compile": True}
    if cache == "quantized":
        kind["cache_config"] = {"backend": "fp8"}
    with torch.no_grad():
        original = model.generate(prompt, **asked, **kind)
        with patched(model, at(layers_for(model), EVERYTHING)):
            assert torch.equal(model.generate(prompt, **asked, **kind), original)
        with patched(model, layers_for(model)):
            if cache != "quantized":  # whose numbers are others
                assert torch.equal(model.generate(prompt, **asked, **kind), model.generate(prompt, **asked))


def test_generate_compiles_no_patched_model(model):
    assert model.get_compiled_call(None) is model
    assert copy.deepcopy(model).get_compiled_call(None) is not model
    remove(model)
    assert "get_compiled_call" not in vars(model)


def test_compiled_by_hand_it_answers_alike(model):
    """Compiled code stops at every attention; the backend without a compiler shows where."""
    tokens, mask = tokens_of(), torch.ones(2, N, dtype=torch.int64)
    mask[0, [3, 9]] = 0
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        got, wanted = (one(tokens, attention_mask=mask).logits for one in (compiled, model))
        torch.testing.assert_close(got, wanted)
    assert not _stacks.calls


def test_a_cache_that_has_dropped_keys_is_refused(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens_of(2, 30), past_key_values=cache)
        layer = cache.layers[2]
        layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]
        with pytest.raises(ConsolidationError, match="26 of 31 keys"):
            model(tokens_of(2, 1), past_key_values=cache)


def test_a_cache_that_was_filled_in_inference_mode_can_be_used_outside_and_one_with_gradients_has_them(model):
    tokens, cache = tokens_of(), DynamicCache(config=model.config)
    whole = model(tokens).logits
    with torch.inference_mode():
        model(tokens[:, :20], past_key_values=cache)
    with torch.no_grad():
        got = model(tokens[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(got, whole[:, 20:], **CLOSE)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)  # keys of layer 0 need no gradient
    wanted = torch.autograd.grad(model(tokens).logits.square().sum(), weight)[0]
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in tokens.split([20, 20], dim=1)]
    found = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_an_offloaded_cache_keeps_no_room_on_the_device():
    cache = DynamicCache()
    cache.offloading = True
    let_grow(cache)
    assert cache.layer_class_to_replicate is not GrowingLayer


def test_lora_on_all_linear_maps_leaves_the_patch_alone():
    model, tokens = model_of("llama"), tokens_of()
    layers = at(layers_for(model), 0.0)
    install(model, layers)
    before = [copy.deepcopy(layer.state_dict()) for layer in layers.values()]
    changed = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    assert not [name for name, _ in changed.named_parameters() if "consolidated" in name and "lora" in name]
    with torch.no_grad():
        answer = changed(tokens).logits
        merged = changed.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, answer, **CLOSE)
    for layer, state in zip(installed(merged).values(), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    remove(merged)
    assert not installed(merged)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model):
    tokens = tokens_of()
    model.requires_grad_(True)
    found = []
    for checkpointing in (False, True):
        model.train()  # as checkpointing asks for
        (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert not _stacks.calls


def test_offloaded_weights_are_patched_where_they_are_computed(tmp_path):
    model, tokens = model_of("llama"), tokens_of()
    with torch.no_grad():
        with patched(model, layers_for(model)):
            wanted = model(tokens).logits
        model.save_pretrained(tmp_path / "model")
        where = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
        where |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        other = (
            type(model)
            .from_pretrained(tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "offloaded"))
            .eval()
        )
        assert {p.device.type for p in other.parameters()} == {"cpu", "meta"}
        with patched(other, layers_for(other)):
            assert {p.device.type for layer in installed(other).values() for p in layer.parameters()} == {"cpu"}
            torch.testing.assert_close(other(tokens).logits, wanted, **CLOSE)


def test_a_patch_sits_at_one_model_and_thresholds_make_copies():
    model = model_of("llama")
    install(model, layers := layers_for(model))
    with pytest.raises(ConsolidationError, match=r"patches of layers \[0, 1, 2\] are installed"):
        install(model_of("llama"), layers)
    other = layers[0].at(3.0)
    assert (layers[0].threshold, other.threshold, other.attached) == (0.0, 3.0, False)
    assert other.gate.weight is layers[0].gate.weight
    remove(model)
    with patched(model, layers):
        pass


def test_the_old_way_to_set_a_rule_still_works_and_says_what_to_do():
    model, tokens = model_of("llama"), tokens_of()
    layers = layers_for(model)
    for layer in layers.values():
        with pytest.warns(DeprecationWarning, match=r"layer\.at\(threshold\)"):
            layer.rule = lambda scores: torch.ones_like(scores, dtype=torch.bool)
    with torch.no_grad(), patched(model, layers):
        torch.testing.assert_close(model(tokens).logits, model_of("llama")(tokens).logits, **CLOSE)


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
OTHERS = {
    "DeepseekV3": MLA,  # values narrower than keys
    "DiffLlama": {},  # asks for attention twice
    "Doge": {},  # a bias of its own for every head
    "Gemma2": {"head_dim": 8, "num_key_value_heads": 2},  # bent scores, every other layer a window
    "StableLm": {"num_key_value_heads": 2},  # asks the interface, and does not say so
    "GptOss": {  # learned sinks, every other layer a window
        "head_dim": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "Qwen3Next": {  # a gate behind attention, three of four layers without
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("name", [*OTHERS, "eager"])
def test_attention_of_other_kinds_is_patched_right(name):
    """Closed it is the original bit by bit; with every read made, as good as; in one pass, with a cache, padded."""
    torch.manual_seed(0)
    if name == "eager":
        model = model_of("llama")
        model.set_attn_implementation("eager")
    else:
        config = getattr(transformers, f"{name}Config")(**SIZES | OTHERS[name], max_position_embeddings=128)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    tokens, mask = tokens_of(), torch.ones(2, N, dtype=torch.int64)
    mask[0, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    before = model.config._attn_implementation
    with torch.no_grad():
        plain = model(tokens).logits
        layers = layers_for(model)
        with patched(model, at(layers, EVERYTHING)):
            torch.testing.assert_close(model(tokens).logits, plain, **CLOSE)
            with closed(model):
                assert torch.equal(model(tokens).logits, plain)
        with patched(model, layers):
            whole = model(tokens).logits
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in tokens.split([20, 17, 1, 1, 1], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
            padded = model(tokens, attention_mask=mask, position_ids=places).logits
            torch.testing.assert_close(padded[0, 7:], model(tokens[:1, 7:]).logits[0], **CLOSE)
        assert 0 < sum(x.counts.far_reads for x in layers.values()) < sum(x.counts.far_tokens for x in layers.values())
        assert torch.equal(model(tokens).logits, plain)
    assert model.config._attn_implementation == before


def test_layers_of_other_types_are_taken_if_they_see_everything():
    torch.manual_seed(0)
    config = transformers.FalconH1Config(
        **SIZES,
        num_key_value_heads=2,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_ssm=64,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    assert [s.layer for s in consolidatable_sites(transformers.FalconH1ForCausalLM(config))] == [0, 1, 2]


def test_every_name_is_quiet():
    """No warning on the way in and out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            model = model_of(name)
            with torch.no_grad(), patched(model, layers_for(model)):
                model(tokens_of(1, WINDOW + N_SINKS + 2))
    assert ConsolidatedAttention.CHILD == "consolidated"
