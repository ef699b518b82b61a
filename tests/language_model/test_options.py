"""Every option of a CRAM language model keeps what holds without it: steps, padding, packed rows, caches, saving."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_cram import ids, make  # noqa: E402
from torch.nn.functional import pad  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from cramlab.config import ConfigError, differing  # noqa: E402
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig  # noqa: E402
from cramlab.memory import CRAMLayer, WorkingLayer  # noqa: E402

OPTIONS = {
    "memories in the last layer": {"num_hidden_layers": 3, "memory_layers": [2]},
    "... of a delta rule that always reads": {"memory_layers": [1], "working": "delta", "router": "always"},
    "no memories at all": {"memory_layers": []},
    "rotary positions and norms": {"rope": True, "rope_theta": 40.0, "qk_norm": True},
    "... in one layer that always reads": {"rope": True, "qk_norm": True, "memory_layers": [1], "router": "always"},
    "a table of bigrams": {"bigram_slots": 70},
    "a window": {"window": 4},
    "... and no reads": {"window": 3, "router": "never", "rope": True},
    "everything": {
        "window": 5,
        "num_hidden_layers": 3,
        "bigram_slots": 70,
        "rope": True,
        "qk_norm": True,
        "memory_layers": [1],
        "working": "delta",
    },
}
NEW_FIELDS = ("memory_layers", "rope", "rope_theta", "qk_norm", "bigram_slots", "window")
of_options = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
of_writes = pytest.mark.parametrize("write", ["all", "salience"])


@of_options
@of_writes
@pytest.mark.parametrize("gradients", [False, True])
def test_prefill_chunks_and_steps_equal_one_pass(changes, write, gradients):
    model, tokens = make(memory_write=write, **changes), ids(3, 30)
    with torch.set_grad_enabled(gradients):
        whole = model(tokens).logits
        cache, parts, start = DynamicCache(), [], 0
        for n in (11, 1, 1, 7, 1, 1, 8):
            parts.append(model(tokens[:, start : start + n], past_key_values=cache).logits)
            start += n
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@of_options
@of_writes
def test_padding_anywhere_changes_nothing_then_steps_go_on(changes, write):
    model, tokens = make(memory_write=write, **changes), ids(1, 20)
    plain = model(tokens).logits
    for first, gap, last in ((4, 0, 0), (0, 5, 0), (0, 0, 3), (2, 3, 1)):
        padded = torch.cat([pad(tokens[:, :6], (first, gap), value=7), pad(tokens[:, 6:14], (0, last), value=9)], dim=1)
        valid = torch.cat([pad(torch.ones(1, 6), (first, gap)), pad(torch.ones(1, 8), (0, last))], dim=1).long()
        with torch.no_grad():
            found = model(padded, attention_mask=valid, use_cache=True)
            torch.testing.assert_close(found.logits[valid == 1], plain[0, :14], atol=1e-4, rtol=1e-4)
            for t in range(14, 20):
                step = model(tokens[:, t : t + 1], past_key_values=found.past_key_values).logits
                torch.testing.assert_close(step[:, 0], plain[:, t], atol=1e-4, rtol=1e-4)


@of_options
@of_writes
def test_packed_rows_are_separate_rows(changes, write):
    model, texts = make(memory_write=write, **changes), [ids(1, n)[0] for n in (12, 5, 14)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    together = model(torch.cat(texts)[None], position_ids=positions).logits[0]
    alone = [model(text[None]).logits[0] for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@of_options
def test_rows_of_a_cache_can_be_chosen(changes):
    model, tokens, following = make(**changes), ids(), ids(3, 1)
    order = torch.tensor([2, 2, 0])
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        cache.reorder_cache(order)
        first = model(following, past_key_values=cache).logits
        cache.reorder_cache(order)
        second = model(following[order], past_key_values=cache).logits
        rows = torch.cat([tokens[order], following], dim=1)
        torch.testing.assert_close(first[:, 0], model(rows).logits[:, -1], atol=1e-4, rtol=1e-4)
        rows = torch.cat([rows[order], following[order]], dim=1)
        torch.testing.assert_close(second[:, 0], model(rows).logits[:, -1], atol=1e-4, rtol=1e-4)


@of_options
def test_generation_of_a_padded_batch_equals_each_alone_without_a_cache(changes):
    model = make(**changes)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = [ids(1, n)[0] for n in (14, 3)]
    padded = torch.stack([pad(row, (14 - len(row), 0)) for row in rows])
    mask = (torch.arange(14) >= torch.tensor([[14 - len(row)] for row in rows])).long()
    for row, found in zip(rows, model.generate(padded, attention_mask=mask, **how), strict=True):
        slow = model.generate(row[None], attention_mask=torch.ones(1, len(row)).long(), use_cache=False, **how)
        assert torch.equal(found[14:], slow[0, len(row) :])


@of_options
@of_writes
def test_every_parameter_learns_and_checkpointing_changes_no_gradient(changes, write):
    model = make(memory_write=write, **changes).train()
    tokens, found = ids(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, found[1][name])


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"bigram_slots": 70, "rope": True, "qk_norm": True}, {"window": 3}], ids=str)
def test_the_pass_without_reads_of_the_judged_layer_is_a_pass_without_reads(layer, changes):
    model, tokens = make(num_hidden_layers=3, memory_layers=[layer], audit_frac=0.0, **changes).train(), ids()
    seen = []
    hook = model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens, labels=tokens)
    model(tokens, read_none=True)
    hook.remove()
    with_reads, silent, without = seen
    torch.testing.assert_close(silent, without)
    assert not torch.allclose(with_reads, without)


@of_options
def test_saved_and_loaded_it_is_the_same_model(changes, tmp_path):
    model, tokens = make(**changes), ids()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert differing(model.config.to_dict(), again.config.to_dict()) == {"_name_or_path": ""}
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_config_without_these_options_is_that_of_before():
    """The names of all weights and the defaults of a checkpoint made before there were options."""
    old = {key: value for key, value in make().config.to_dict().items() if key not in NEW_FIELDS}
    assert CRAMForCausalLMConfig.from_dict(old).to_dict() == make().config.to_dict()
    assert {name.removeprefix("layers.0.") for name in make().state_dict() if name.startswith("layers.0.")} == {
        *(f"mixer.working.{name}" for name in (
            "log_rate", "write.weight", "norm.weight", "w_tau.weight", "w_tau.bias", "w1.weight", "w2.weight",
            "w2.bias", "w_out.weight",
        )),
        *(f"mixer.episodic.{name}.weight" for name in ("w_query", "w_key", "w_value", "w_out")),
        *(f"mixer.{name}.{kind}" for name in ("semantic.w_down", "semantic.w_up", "gate.hidden", "gate.out")
          for kind in ("weight", "bias")),
        *(f"{name}.{kind}" for name in ("mlp_in", "mlp_out") for kind in ("weight", "bias")),
        "mixer.norm.weight", "mixer_norm.weight", "mlp_norm.weight",
    }  # fmt: skip


def test_layers_without_memories_hold_a_working_memory_alone():
    model = make(num_hidden_layers=3, memory_layers=[1])
    assert [type(block.mixer) for block in model.layers] == [WorkingLayer, CRAMLayer, WorkingLayer]
    for layer in (0, 2):
        names = [name for name, _ in model.layers[layer].mixer.named_parameters()]
        assert all(name.startswith("working.") for name in names)
        output = model.layers[layer].mixer(torch.randn(2, 9, 32), torch.ones(2, 9))
        assert not output.trace.scored.any()
        assert output.state.buffer.n_places == 0
    assert model.config.routers() == ["never", "benefit", "never"]


def test_without_semantic_answers_and_reads_a_memory_layer_is_a_layer_without_memories():
    with_memories, without = make(router="never"), make(memory_layers=[])
    without.load_state_dict({name: t for name, t in with_memories.state_dict().items() if name in without.state_dict()})
    with torch.no_grad():
        for block in with_memories.layers:
            block.mixer.semantic.w_up.weight.zero_()
            block.mixer.semantic.w_up.bias.zero_()
    tokens = ids()
    assert torch.equal(with_memories(tokens).logits, without(tokens).logits)


def test_a_layer_that_always_reads_has_no_semantic_memory_if_layers_are_chosen():
    chosen, all_layers = make(memory_layers=[0, 1], router="always"), make(router="always")
    assert not [name for name, _ in chosen.named_parameters() if "semantic" in name]
    assert [name for name, _ in all_layers.named_parameters() if "semantic" in name]  # checkpoints of before have them
    chosen.load_state_dict({n: t for n, t in all_layers.state_dict().items() if n in chosen.state_dict()})
    tokens = ids()
    assert torch.equal(chosen(tokens).logits, all_layers(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_layers": [2]}, "memory_layers = \\[2\\] names layer 2 of 2; give layers from 0 to 1"),
        ({"memory_layers": [-1]}, "names layer -1"),
        ({"memory_layers": [1], "router": ["always", "never"]}, 'router\\[0\\] = "always" is of a layer without'),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        CRAMForCausalLM(CRAMForCausalLMConfig(num_hidden_layers=2, **changes))


def test_random_reads_of_all_or_no_tokens_are_those_of_the_other_routers():
    tokens = ids(2, 12)
    for share, router in ((1.0, "always"), (0.0, "never")):
        model, other = make(router="random", random_frac=share), make(router=router)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits)
        found = [one.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0) for one in (model, other)]
        assert torch.equal(*found)
    with pytest.raises(ConfigError, match=r"random_frac = 1\.5"):
        make(router="random", random_frac=1.5)
