import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from cramlab import records
from cramlab.hf import text_run
from cramlab.hf.modeling import CRAMForCausalLMConfig
from cramlab.hf.pretrain import PreparedText
from cramlab.hf.text_run import ModelName, TextRunConfig, run_text

TINY = TextRunConfig(
    vocab_size=30, context=16, n_layers=8, d_model=16, n_heads=2, batch_size=4, n_steps=6, warmup_steps=2,
    eval_every_steps=2,
)  # fmt: skip


@pytest.fixture
def text():
    stream = (torch.arange(2000) * 7 % 30).to(torch.int32)  # each token says what comes next
    return PreparedText(None, stream, stream[:600])


def test_they_are_of_one_size_and_differ_in_who_attends(text, tmp_path):
    found = {model: run_text(dataclasses.replace(TINY, model=model), text, tmp_path) for model in ModelName.__args__}
    sizes = [record["n_parameters"] for record in found.values()]
    assert max(sizes) < 1.02 * min(sizes)
    assert found["llama"]["series"][-1]["attention_frac"] == 1.0
    assert found["dense"]["series"][-1]["attention_frac"] == 1.0
    assert found["recurrent"]["series"][-1]["attention_frac"] == 0.0
    assert found["hybrid"]["series"][-1]["attention_frac"] == pytest.approx(1 / 8)
    assert found["hybrid"]["series"][-1]["attention_frac_by_layer"][4] == 1.0
    for record in found.values():
        assert record["series"][-1]["n_tokens"] == 6 * 4 * 16
        assert record["series"][-1]["nats_per_token"] < 3.6


def test_a_stopped_run_goes_on_to_the_same_figures(text, tmp_path, monkeypatch):
    whole = run_text(TINY, text, tmp_path / "whole")
    held_out = text_run.held_out

    def stop(*args):
        if len(list((tmp_path / "cut").glob("*.pt"))) and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return held_out(*args)

    monkeypatch.setattr(text_run, "held_out", stop)
    with pytest.raises(KeyboardInterrupt):
        run_text(TINY, text, tmp_path / "cut")
    (tmp_path / "again").touch()
    resumed = run_text(TINY, text, tmp_path / "cut")
    assert resumed["series"] == whole["series"]
    assert records.read_json(tmp_path / "cut" / f"{TINY.name}.json")["series"] == whole["series"]


def test_out_of_time_it_stops_at_a_checkpoint_and_goes_on(text, tmp_path):
    with pytest.raises(TimeoutError, match="out of time at step 2"):
        run_text(TINY, text, tmp_path, deadline=0.0)
    with pytest.raises(TimeoutError, match="out of time at step 4"):
        run_text(TINY, text, tmp_path, deadline=0.0)
    assert run_text(TINY, text, tmp_path, deadline=0.0)["series"][-1]["step"] == 6


def test_routers_are_one_for_all_or_one_for_each():
    assert CRAMForCausalLMConfig(num_hidden_layers=2, router=["always", "never"]).routers() == ["always", "never"]
    with pytest.raises(ValueError, match="names 1 layers of 2"):
        CRAMForCausalLMConfig(num_hidden_layers=2, router=["always"]).routers()
    with pytest.raises(ValueError, match='"oracle" cannot serve text'):
        CRAMForCausalLMConfig(num_hidden_layers=1, router="oracle").routers()
