"""What a checkpoint lacks is as in a new model, whatever stood in the memory before."""

import pytest
import torch
from families import GPT2_SIZES
from tiny_cram import make
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cramlab.language_model.cram_gpt2 import CramGPT2Config, CramGPT2LMHeadModel
from cramlab.language_model.fresh_weights import reset_missing
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig


def assert_as_new(found, fresh, name):
    """Constants and rates are the same; what is drawn is finite, drawn anew, and as large on average."""
    found, fresh = found.detach(), fresh.detach()
    assert torch.isfinite(found).all(), name
    if name.endswith("log_rate") or torch.equal(fresh, fresh.flatten()[:1].expand(fresh.numel()).view_as(fresh)):
        assert torch.equal(found, fresh) or name.endswith("gate.out.bias"), name
    else:
        assert not torch.equal(found, fresh), name
        assert float(found.abs().mean()) == pytest.approx(float(fresh.abs().mean()), rel=0.8), name


CHANGES = [
    {"memory_write": "salience"},
    {"num_hidden_layers": 3},
    {"semantic_rank": 16},
    {"router": ["benefit", "always"]},
    {"vocab_size": 60},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_weights_that_a_checkpoint_lacks_are_those_of_a_new_model(tmp_path, change):
    saved = make(**({"router": "always"} if "router" in change else {}))
    saved.save_pretrained(tmp_path)
    config = CRAMForCausalLMConfig.from_pretrained(tmp_path, **change)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    fresh = dict(CRAMForCausalLM(config).named_parameters())
    absent = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    assert absent or "tie_word_embeddings" in change
    held = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        if name in absent:
            assert_as_new(parameter, fresh[name], name)
        elif name != "lm_head.weight":
            assert torch.equal(parameter, held[name]), name


class OuterConfig(PreTrainedConfig):
    model_type = "outer_of_a_test"


class Outer(PreTrainedModel):
    config_class = OuterConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = CRAMForCausalLM(make().config)
        self.outer = torch.nn.Linear(4, 4)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.constant_(module.weight, 7.0)


def test_inside_another_model_too(tmp_path):
    fresh = Outer(OuterConfig())
    assert (fresh.outer.weight == 7).all()
    assert not (fresh.inner.layers[0].mlp_in.weight == 7).any()
    state = {name: value for name, value in fresh.state_dict().items() if "layers.1" not in name}
    fresh.save_pretrained(tmp_path, state_dict=state)
    again, info = Outer.from_pretrained(tmp_path, output_loading_info=True)
    assert any("layers.1.mixer.working.log_rate" in name for name in info["missing_keys"])
    expected = dict(fresh.named_parameters())
    for name, parameter in again.named_parameters():
        if name in info["missing_keys"]:
            assert_as_new(parameter, expected[name], name)
        else:
            assert torch.equal(parameter, expected[name]), name


def test_a_gpt2_with_cram_layers_too(tmp_path):
    fresh = CramGPT2LMHeadModel(CramGPT2Config(**GPT2_SIZES))
    state = {
        name: value
        for name, value in fresh.state_dict().items()
        if "h.1.attn" not in name and "h.0.mlp.c_proj" not in name
    }
    fresh.save_pretrained(tmp_path, state_dict=state)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) > 10
    expected = dict(fresh.named_parameters())
    for name, parameter in again.named_parameters():
        if name in info["missing_keys"]:
            assert_as_new(parameter, expected[name], name)
        else:
            assert torch.equal(parameter, expected[name]), name


def test_what_was_loaded_stays_beside_what_was_not():
    layer = make(memory_write="salience").layers[0].mixer
    rates, write = layer.working.log_rate, layer.working.write.weight
    with torch.no_grad():
        rates.fill_(3.0)
        write.fill_(torch.nan)
        layer.episodic.salience.out.bias.fill_(torch.nan)
    rates._is_hf_initialized = True
    reset_missing(layer.working.write)
    reset_missing(layer.working)
    reset_missing(layer.episodic.salience)
    assert (rates == 3).all()
    assert torch.isfinite(write).all()
    assert layer.episodic.salience.out.bias == 1
    with pytest.raises(NotImplementedError, match="no reset_parameters"):
        reset_missing(torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2))]))
