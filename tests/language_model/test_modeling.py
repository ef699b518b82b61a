import dataclasses
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_cram import ids, make  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from cramlab.config import ConfigError  # noqa: E402
from cramlab.language_model.cache import CRAMCacheLayer  # noqa: E402
from cramlab.language_model.modeling import CRAMForCausalLM  # noqa: E402
from cramlab.objective import LossConfig  # noqa: E402


@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("gradients", [False, True])
def test_prefill_and_steps_equal_one_pass(write, gradients):
    """Without gradients the steps are made in place, with them by the layers' own call."""
    torch.set_grad_enabled(gradients)
    try:
        prefill_and_steps(write)
    finally:
        torch.set_grad_enabled(True)


def test_prefill_and_steps_equal_one_pass_with_a_delta_rule():
    with torch.no_grad():
        prefill_and_steps("all", working="delta")


def prefill_and_steps(write, **changes):
    model = make(memory_write=write, **changes)
    tokens = ids()
    whole = model(tokens).logits
    first = model(tokens[:, :11], use_cache=True)
    cache, parts = first.past_key_values, [first.logits]
    for t in range(11, 20):
        parts.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    assert cache.get_seq_length() == 20
    assert all(layer.keys.shape[1] <= 12 for layer in cache.layers)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_in_bfloat16_it_trains_and_steps_still_equal_one_pass(way):
    """To its rounding, 2^-8, Euclidean. All tokens read, as a gate near its threshold may change its mind."""
    model = make(router="always")
    model = model.to(torch.bfloat16) if way == "weights" else model
    tokens = ids()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        with torch.no_grad():
            whole = model(tokens).logits.float()
            cache = model(tokens[:, :11], use_cache=True).past_key_values
            steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits.float() for t in range(11, 20)]
        assert (torch.cat(steps, dim=1) - whole[:, 11:]).norm() < 2**-8 * whole[:, 11:].norm()
        gated = make(memory_write="salience").to(next(model.parameters()).dtype).train()
        loss = gated(tokens, labels=tokens).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in gated.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert gated.eval().generate(tokens, max_new_tokens=15, eos_token_id=None).shape == (3, 35)


@pytest.mark.parametrize("n_beams", [1, 3])
@pytest.mark.parametrize("write", ["all", "salience"])
def test_generation_of_a_left_padded_batch_equals_each_alone_and_without_a_cache(n_beams, write):
    model = make(memory_write=write)
    how = {"max_new_tokens": 9, "num_beams": n_beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = [ids(1, n)[0] for n in (14, 9, 3)]
    padded = torch.stack([torch.nn.functional.pad(row, (14 - len(row), 0)) for row in rows])
    mask = (torch.arange(14) >= torch.tensor([[14 - len(row)] for row in rows])).long()
    together = model.generate(padded, attention_mask=mask, **how)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **how)
        slow = model.generate(
            row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), use_cache=False, **how
        )
        assert torch.equal(found[14:], alone[0, len(row) :])
        assert torch.equal(alone, slow)


@pytest.mark.parametrize("working", ["leaky", "delta"])
def test_padding_on_either_side_leaks_nothing(working):
    model = make(working=working)
    tokens = ids(1, 10)
    plain = model(tokens).logits
    for left, right in ((4, 0), (0, 4)):
        padded = torch.nn.functional.pad(tokens, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        assert torch.allclose(model(padded, attention_mask=mask).logits[:, left : left + 10], plain, atol=1e-5)


@pytest.mark.parametrize("write", ["all", "salience"])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, write):
    model = make(memory_write=write)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, CRAMForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert again.config.memory_write == write
    tokens = ids()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.lm_head.weight is again.embed_tokens.weight


def test_cropping_is_refused_with_the_reason():
    model = make()
    cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="recurrent state is a sum"):
        cache.crop(-3)
    cache.crop(0)
    assert not CRAMCacheLayer().is_croppable


def test_cache_rows_can_be_chosen_repeated_and_forgotten():
    model = make(memory_write="salience")
    tokens, following = ids(), ids(3, 1)
    cache = model(tokens, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    order = torch.tensor([2, 2, 0])
    expected = model(torch.cat([tokens[order], following], dim=1)).logits[:, -1]
    assert torch.allclose(model(following, past_key_values=cache).logits[:, -1], expected, atol=1e-4)
    cache.batch_repeat_interleave(2)
    assert len(cache.layers[0].state.working) == 6
    with torch.no_grad():  # rows are chosen again after steps in place
        stepped = model(following.repeat_interleave(2, 0), past_key_values=cache).logits
        expected = model(torch.cat([tokens[order], following, following], dim=1)).logits[:, -1]
        assert cache.layers[0].decoder is not None
        assert torch.allclose(stepped[::2, -1], expected, atol=1e-4)
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert len(cache.layers[0].keys) == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens, past_key_values=cache).logits, model(tokens).logits)


@pytest.mark.parametrize("write", ["all", "salience"])
def test_it_learns_and_every_parameter_takes_part(write):
    model = make(memory_write=write).train()
    tokens = ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, touched = [], set()
    for step in range(30):
        loss = model(tokens, labels=tokens, read_all=step < 10).loss
        optimizer.zero_grad()
        loss.backward()
        touched |= {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert touched == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("router", ["benefit", "always", "never", ["never", "benefit", "benefit"]])
@pytest.mark.parametrize("write", ["all", "salience"])
@pytest.mark.parametrize("opened", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("read_all", [False, True])
def test_every_parameter_has_a_gradient_on_every_step(router, write, opened, read_all):
    """Whether nobody reads and writes, some or all; data parallel would wait for ever for one that has none."""
    model = make(router=router, memory_write=write, num_hidden_layers=3, audit_frac=0.0).train()
    for block in model.layers:
        for gate in (getattr(block.mixer, "gate", None), block.mixer.episodic.salience):
            if gate is not None:
                gate.out.bias.data.fill_(opened)
        episodic = dataclasses.replace(block.mixer.config.episodic, write_audit_frac=0.0)
        block.mixer.config = dataclasses.replace(block.mixer.config, episodic=episodic)
    model(tokens := ids(), labels=tokens, read_all=read_all).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_audits_are_of_one_layer_at_a_time():
    """As in `SequenceModel`; in its second pass, where that layer is silent, those above it are not audited either."""
    model = make(num_hidden_layers=3, audit_frac=1.0).train()
    shares = []
    for block in model.layers:
        block.mixer.register_forward_hook(lambda *args: shares.append(args[-1].trace.scored.float().mean().item()))
    tokens = ids()
    for _ in range(5):
        shares.clear()
        model(tokens, labels=tokens)
        assert sum(share == 1.0 for share in shares) == 1
    shares.clear()
    model(tokens, labels=tokens, read_all=True)
    assert all(share == 1.0 for share in shares)


def test_the_loss_is_the_next_token_s_outside_of_training():
    model = make()
    tokens = ids()
    output = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    as_tuple = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(as_tuple[1], output.logits)
    assert len(model(tokens, output_hidden_states=True).hidden_states) == 3
    assert torch.allclose(model(tokens, logits_to_keep=1).logits, output.logits[:, -1:], atol=1e-6)


def test_a_config_of_before_the_weights_of_the_loss_were_fields_has_their_values(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    held = json.loads(path.read_text())
    for name in ("benefit_cap", "gate_weight", "no_read_weight", "no_read_floor", "consolidation_weight"):
        del held[name]
    path.write_text(json.dumps(held))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = LossConfig(read_price=0.1, benefit_cap=2.0, no_read_weight=0.5, no_read_floor=1.0, retrieval_emphasis=1)
    assert again.objective == model.objective == expected


def test_weights_of_the_loss_change_it_and_are_refused_out_of_range():
    tokens, losses = ids(), {}
    for name, value in ((None, 0.0), ("benefit_cap", 0.01), ("gate_weight", 0.0), ("no_read_weight", 0.0),
                        ("no_read_floor", 0.0), ("consolidation_weight", 0.0), ("read_price", 5.0)):  # fmt: skip
        torch.manual_seed(3)
        model = make(**({} if name is None else {name: value})).train()
        torch.manual_seed(4)
        losses[name] = float(model(torch.full_like(tokens, 7), labels=torch.full_like(tokens, 9)).loss.detach())
        if name is not None:
            with pytest.raises(ConfigError, match=rf"^{name} = -1.0 must be at least 0"):
                make(**{name: -1.0})
    assert len(set(losses.values())) == len(losses)


def test_the_model_is_found_by_its_package():
    import cramlab.language_model

    assert cramlab.language_model.CRAMForCausalLM is CRAMForCausalLM
    with pytest.raises(AttributeError, match="has no attribute 'CRAM'"):
        cramlab.language_model.CRAM  # noqa: B018


def test_an_unknown_working_memory_is_refused():
    with pytest.raises(ValueError, match='working = "delt" is unknown; give "leaky" or "delta"'):
        make(working="delt")


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        make()()
    with pytest.raises(ValueError, match="gumbel"):
        make(router="gumbel")
