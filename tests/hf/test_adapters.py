"""Adapters of peft on any linear map of a CRAM layer move the output, learn, and can be merged."""

import pytest
import torch
from families import build
from peft import LoraConfig, get_peft_model
from tiny_cram import ids, make

MAPS = sorted(
    {
        name.split(".", 2)[2]
        for name, module in make(memory_write="salience", num_hidden_layers=1).named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("layers.")
    }
)


def adapted(target):
    """A model of one layer with LoRA that says something from the start."""
    tied = target not in ("embed_tokens", "lm_head")  # peft warns of merging into a tied weight
    model = make(memory_write="salience", num_hidden_layers=1, tie_word_embeddings=tied)
    return get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()


def answers(model, tokens):
    """What every path says: the layer's call, and a step of decoding; and the logits of the gates."""
    gates, base = [], model.get_base_model() if hasattr(model, "get_base_model") else model
    mixer = base.layers[0].mixer
    for gate in (mixer.gate, mixer.episodic.salience):
        gates.append(gate.register_forward_hook(lambda *args: said.append(args[-1])))
    said = []
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
    for hook in gates:
        hook.remove()
    return [whole, *steps, *said]


def test_the_maps_are_all_there():
    assert len(MAPS) == 17
    assert {"mixer.gate.hidden", "mixer.episodic.salience.hidden", "mixer.working.w_tau"} <= set(MAPS)


@pytest.mark.parametrize("target", [*MAPS, "embed_tokens", "lm_head"])
def test_an_adapter_acts_learns_and_merges(target):
    tokens = ids(1)
    model = adapted(target)
    with_adapter = answers(model, tokens)
    torch.testing.assert_close(torch.cat(with_adapter[1:11], dim=1), with_adapter[0][:, 10:], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        without = answers(model, tokens)
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(with_adapter, without, strict=True))
    model.train()
    for _ in range(5):  # audits are drawn, and so is what the write gate refuses
        model(tokens, labels=tokens).loss.backward()
    learned = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert learned
    assert all(grad is not None for grad in learned)
    assert any(grad.any() for grad in learned)
    merged = model.eval().merge_and_unload()
    for found, expected in zip(answers(merged, tokens), with_adapter, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_the_gate_of_a_gpt2_with_cram_layers():
    tokens = ids(2, 12)
    model = get_peft_model(build("cram_gpt2"), LoraConfig(r=2, target_modules=["gate.hidden"], init_lora_weights=False))
    seen = []
    mixer = model.get_base_model().transformer.h[0].attn.mixer
    mixer.register_forward_hook(lambda *args: seen.append(args[-1].trace.gate_logit))
    with torch.no_grad():
        model(tokens)
        with model.disable_adapter():
            model(tokens)
        model.merge_and_unload()(tokens)
    torch.testing.assert_close(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1])


def test_modules_that_are_trained_as_copies_take_part():
    tokens = ids(1)
    config = LoraConfig(r=2, target_modules=["w_query"], modules_to_save=["gate", "semantic", "salience"])
    model = get_peft_model(make(memory_write="salience", num_hidden_layers=1), config).train()
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
    saved = [p.grad for name, p in model.named_parameters() if "modules_to_save" in name]
    assert len(saved) == 12
    assert all(grad is not None for grad in saved)
