"""Arms of the comparison of language models: what reads where, and sizes; fields that the command line changes."""

import dataclasses

import pytest
import torch
from transformers import MistralForCausalLM

from cramlab.config import ConfigError
from cramlab.language_model import training
from cramlab.language_model.llama_with_bigrams import LlamaWithBigrams
from cramlab.language_model.scoring import score
from cramlab.language_model.text import PreparedText
from cramlab.language_model.training import run_text
from reproduction.protocols.language import ARMS, BASE, configs

TINY = dataclasses.replace(
    BASE, vocab_size=30, context=16, d_model=16, n_heads=2, batch_size=4, n_steps=3, warmup_steps=2, eval_every_steps=3,
    least_gain=None, encoding_frac=0.3, ramp_frac=0.0, precision="32", compile=False,
)  # fmt: skip
KINDS = [
    "llama", "llama-window", "llama-bigrams", "recurrent", "layers-3-7", "cram-12", "soft-12", "random-12", "window",
    "cram-12-window", "cram-12-bigrams",
]  # fmt: skip
SMALL = ["cram.gate_width=4", "cram.semantic_rank=4"]


@pytest.fixture
def text():
    stream = (torch.arange(2000) * 7 % 30).to(torch.int32)
    return PreparedText(None, stream, stream[:600])


def tiny(arm, *assignments):
    slots = ["bigram_slots=20"] if "bigrams" in arm else []
    return configs(TINY, [arm], [*SMALL, *slots, *(["window=4"] if "window" in arm else []), *assignments])[0]


def test_all_arms_are_of_one_size_and_a_table_comes_on_top():
    sizes = {}
    for arm in KINDS:
        config = configs(BASE, [arm], [])[0]
        with torch.device("meta"):
            sizes[arm] = config.build().num_parameters() - config.bigram_slots * config.d_model
    assert max(sizes.values()) < 1.02 * min(sizes.values()), sizes


@pytest.mark.parametrize("arm", KINDS)
def test_every_kind_of_arm_trains_and_reads_where_it_says(arm, text, tmp_path):
    config = tiny(arm)
    record = run_text(config, text, tmp_path)
    share = record["series"][-1]["attention_frac_by_layer"]
    assert record["ms_per_step"] > 0
    if config.model == "llama":
        assert share == [1.0] * 8
        return
    readers = set(config.cram["memory_layers"]) if config.cram["router"] != "never" else set()
    assert {i for i, layer in enumerate(share) if layer > 0} <= readers
    if config.cram["router"] == "always":
        assert share == [pytest.approx(float(i in readers)) for i in range(8)]
    if config.cram["router"] == "random":
        assert sum(share) / 8 == pytest.approx(0.125, abs=0.03)
        assert record["series"][-1]["encoding_ended_at"] == 1


def test_random_reads_begin_after_the_encoding_phase(text, tmp_path, monkeypatch):
    seen = []
    forward = training.CRAMForCausalLM.forward

    def noted(self, *args, **kwargs):
        if self.training:
            seen.append(kwargs["read_all"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(training.CRAMForCausalLM, "forward", noted)
    run_text(tiny("random-12"), text, tmp_path)
    assert seen == [True, False, False]


def test_a_llama_with_a_window_sees_the_window_alone():
    config = tiny("llama-window", "n_layers=1")
    model = config.build()
    assert isinstance(model, MistralForCausalLM)
    tokens = torch.randint(30, (1, 12), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, :7] = (other[:, :7] + 1) % 30
    found, changed = (score(model, windows, batch_size=1).nats for windows in (tokens, other))
    assert torch.equal(found[:, -1:], changed[:, -1:])  # predicted at token 10, which sees tokens 7 to 10
    assert not torch.equal(found[:, -2], changed[:, -2])


def test_a_llama_has_the_table_of_the_others():
    llama, cram = tiny("llama-bigrams").build(), tiny("layer-7-bigrams").build()
    assert isinstance(llama, LlamaWithBigrams)
    assert llama.bigrams.table.shape == cram.bigrams.table.shape == (20, 16)


def test_fields_of_the_model_are_set_on_the_command_line():
    assert all(configs(TINY, [arm], [])[0].arm == arm for arm in ARMS)
    (config,) = configs(TINY, ["cram-12"], ["arm=cram-6", "cram.memory_layers=[2, 5]", "reads_frac=0.06"])
    assert (config.arm, config.cram["memory_layers"], config.reads_frac) == ("cram-6", [2, 5], 0.06)
    assert config.cram["gate_learns"] == "nats"
    assert configs(TINY, ["llama"], ["cram.gate_width=8"])[0].cram == {}
    with pytest.raises(ConfigError, match=r"cram\.working = leaky is not JSON; write text in quotes"):
        configs(TINY, ["cram-12"], ["cram.working=leaky"])


def test_what_does_not_apply_to_a_model_is_refused():
    with pytest.raises(ConfigError, match=r"bigram_slots = 9 does not apply to .* a Llama with a window"):
        configs(TINY, ["llama-window"], ["bigram_slots=9"])
    with pytest.raises(ConfigError, match='window = 3 does not apply to model = "gpt2"'):
        dataclasses.replace(TINY, model="gpt2", window=3)
