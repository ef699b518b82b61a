import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from cramlab import records
from cramlab.language_model import CRAMForCausalLMConfig, training
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText
from cramlab.language_model.training import run_text

TINY = TextRunConfig(
    vocab_size=30, context=16, n_layers=8, d_model=16, n_heads=2, batch_size=4, n_steps=6, warmup_steps=2,
    eval_every_steps=2,
)  # fmt: skip


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def checkpoints_at_each_evaluation(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", 0.0)


@pytest.fixture
def text():
    stream = (torch.arange(2000) * 7 % 30).to(torch.int32)  # each token says what comes next
    return PreparedText(None, stream, stream[:600])


ONLY_FIFTH = ["always" if i == 4 else "never" for i in range(8)]
ARMS = {
    "cram": {},
    "llama": {"model": "llama"},
    "gpt2": {"model": "gpt2"},
    "dense": {"cram": {"router": "always"}},
    "recurrent": {"cram": {"router": "never"}},
    "hybrid": {"cram": {"router": ONLY_FIFTH}},
    "delta": {"cram": {"working": "delta", "gate_learns": "nats"}, "reads_frac": 0.125},
}


def test_they_are_of_one_size_and_differ_in_who_attends(text, tmp_path):
    found = {
        arm: run_text(dataclasses.replace(TINY, arm=arm, **changes), text, tmp_path) for arm, changes in ARMS.items()
    }
    sizes = [record["n_parameters"] for record in found.values()]
    assert max(sizes) < 1.02 * min(sizes)
    assert found["llama"]["series"][-1]["attention_frac"] == 1.0
    assert found["gpt2"]["series"][-1]["attention_frac"] == 1.0
    assert found["dense"]["series"][-1]["attention_frac"] == pytest.approx(1)
    assert found["recurrent"]["series"][-1]["attention_frac"] == 0.0
    assert found["hybrid"]["series"][-1]["attention_frac"] == pytest.approx(1 / 8)
    assert found["hybrid"]["series"][-1]["attention_frac_by_layer"][4] == pytest.approx(1)
    assert found["delta"]["series"][-1]["attention_frac"] == pytest.approx(1 / 8, abs=0.05)
    for record in found.values():
        assert record["series"][-1]["n_tokens"] == 6 * 4 * 16
        assert record["series"][-1]["nats_per_token"] < 3.6


def test_a_stopped_run_goes_on_to_the_same_figures(text, tmp_path, monkeypatch):
    whole = run_text(TINY, text, tmp_path / "whole")
    held_out = training.held_out

    def stop(*args):
        if len(list((tmp_path / "cut").glob("*.pt"))) and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return held_out(*args)

    monkeypatch.setattr(training, "held_out", stop)
    with pytest.raises(KeyboardInterrupt):
        run_text(TINY, text, tmp_path / "cut")
    (tmp_path / "again").touch()
    resumed = run_text(TINY, text, tmp_path / "cut")
    assert resumed["series"] == whole["series"]
    assert records.read_json(tmp_path / "cut" / f"{TINY.name}.json")["series"] == whole["series"]


def test_a_run_killed_after_its_record_leaves_no_checkpoint_when_called_again(text, tmp_path, monkeypatch):
    unlink, gone = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, **given: gone.append(path))  # killed before it could
    record = run_text(TINY, text, tmp_path)
    monkeypatch.setattr(Path, "unlink", unlink)
    (checkpoint,) = gone
    assert checkpoint.exists()
    assert run_text(TINY, text, tmp_path) == record
    assert not checkpoint.exists()


def test_out_of_time_it_stops_at_a_checkpoint_and_goes_on(text, tmp_path):
    with pytest.raises(TimeoutError, match="out of time at step 2"):
        run_text(TINY, text, tmp_path, deadline=0.0)
    with pytest.raises(TimeoutError, match="out of time at step 4"):
        run_text(TINY, text, tmp_path, deadline=0.0)
    assert run_text(TINY, text, tmp_path, deadline=0.0)["series"][-1]["step"] == 6


def test_a_run_of_other_settings_is_not_taken_for_this_one(text, tmp_path):
    with pytest.raises(TimeoutError):
        run_text(TINY, text, tmp_path, deadline=0.0)
    other = dataclasses.replace(TINY, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"seed0\.pt is of a run with other settings \({'learning_rate': 0\.001}\)"):
        run_text(other, text, tmp_path)
    run_text(TINY, text, tmp_path)
    with pytest.raises(ValueError, match=r"seed0\.json is of a run with other settings"):
        run_text(other, text, tmp_path)
    assert run_text(dataclasses.replace(TINY, device="meta"), text, tmp_path)["config"]["device"] == "cpu"


def test_too_little_held_out_text_is_seen_before_anything_is_trained(text, tmp_path):
    with pytest.raises(ValueError, match=r"600 tokens .* 65 windows of context = 16"):
        run_text(dataclasses.replace(TINY, part="validation"), text, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_record_of_before_a_field_existed_is_still_the_one_asked_for(text, tmp_path):
    run_text(TINY, text, tmp_path)
    path = tmp_path / f"{TINY.name}.json"
    record = records.read_json(path)
    for name in ("weight_decay", "n_checkpoints", "first_checkpoint"):
        del record["config"][name]
    path.write_text(json.dumps(record))
    assert run_text(TINY, text, tmp_path) == record
    with pytest.raises(ValueError, match="weight_decay"):
        run_text(dataclasses.replace(TINY, weight_decay=0.1), text, tmp_path)


def test_models_are_not_saved_without_their_tokenizer(text, tmp_path):
    with pytest.raises(ValueError, match=r"n_checkpoints = 1 .* tokenizer"):
        run_text(dataclasses.replace(TINY, n_checkpoints=1, first_checkpoint=1), text, tmp_path)
    assert not list(tmp_path.iterdir())


def test_routers_are_one_for_all_or_one_for_each():
    assert CRAMForCausalLMConfig(num_hidden_layers=2, router=["always", "never"]).routers() == ["always", "never"]
    with pytest.raises(ValueError, match="names 1 layers of 2"):
        CRAMForCausalLMConfig(num_hidden_layers=2, router=["always"]).routers()
    with pytest.raises(ValueError, match='"oracle" cannot serve text'):
        CRAMForCausalLMConfig(num_hidden_layers=1, router="oracle").routers()


def test_what_is_chosen_by_validation_text_is_not_tested_on_it(text, monkeypatch):
    seen = []
    model = TINY.build()
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, **k: (
        seen.append(input_ids), forward(self, input_ids=input_ids, **k))[1])  # fmt: skip
    stream = torch.arange(600).to(torch.int32) % 30
    longer = dataclasses.replace(text, held_out=torch.cat([stream, 29 - stream, stream]))
    for part in ("test", "validation"):
        training.held_out(model, longer, dataclasses.replace(TINY, part=part), n_batches=2)
    tokens = torch.cat(seen).flatten()
    assert torch.equal(tokens, longer.held_out[: len(tokens)].long())  # one after the other, each once
