"""The shipped language model keeps its promises: size, figures on its own windows, card; made here from a tiny run."""

import dataclasses
import functools
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cramlab import records
from cramlab.language_model.corpus import write_corpus
from cramlab.language_model.scoring import score
from cramlab.language_model.text import open_corpus
from cramlab.language_model.training import run_text
from reproduction.protocols import ship
from reproduction.protocols.language import BASE, assessed, configs


def check(folder):
    record = records.read_json(folder / ship.RECORD)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= ship.MOST_BYTES
    assert (folder / ship.CARD).read_text() == ship.card(record)
    found, promised = ship.measured(folder), record["shipped"]
    assert found["nats_by_window"] == pytest.approx(promised["nats_by_window"], abs=2e-3)
    assert found["reads_frac"] == pytest.approx(promised["reads_frac"], abs=5e-3)
    assert found["n_parameters"] == promised["n_parameters"]
    assert found["sample"].startswith(ship.PROMPT)
    assert len(found["sample"]) > len(ship.PROMPT)


@pytest.mark.skipif(not ship.FOLDER.exists(), reason="the checkpoint is not there yet")
def test_the_shipped_model_is_what_its_card_says():
    check(ship.FOLDER)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("ship")
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnop", k=5)) for _ in range(2500)]
    words = [f"def {word}(x):\n    return x + {letters.choice(words)}\n" for word in words for _ in range(3)]
    write_corpus(root / "corpus", [(str(i), "".join(words[i::30])) for i in range(30)], vocab_size=1600)
    base = dataclasses.replace(
        BASE, vocab_size=1600, context=64, batch_size=2, n_steps=30, warmup_steps=5, eval_every_steps=15,
        precision="32", compile=False, encoding_frac=0.5, n_layers=2,
    )  # fmt: skip
    changes = ["d_model=32", "n_heads=2", "cram.memory_layers=[1]", "cram.gate_width=4"]
    (config,) = configs(base, ["ship"], changes)
    text = open_corpus(root / "corpus")
    run_text(config, text, root / "runs", assess=functools.partial(assessed, text=text, config=config))
    return root, ship.ship(root / "runs", root / "corpus", root / "cram-code")


def test_a_run_becomes_a_folder_that_keeps_its_promises(made):
    root, record = made
    check(root / "cram-code")
    assert "nats_by_window" not in record["training"]["test"]
    shipped = AutoModelForCausalLM.from_pretrained(root / "cram-code", dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(root / "runs" / "ship-seed0" / "step-000030", dtype=torch.float32)
    for one, other in zip(shipped.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16).float())
    tokens = AutoTokenizer.from_pretrained(root / "cram-code")(ship.PROMPT, return_tensors="pt")["input_ids"]
    assert float(score(shipped, tokens, batch_size=1).nats.mean()) > 0


def test_altered_weights_are_noticed(made, tmp_path):
    folder = tmp_path / "cram-code"
    shutil.copytree(made[0] / "cram-code", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.embed_tokens.weight *= 1.5
    model.save_pretrained(folder)
    with pytest.raises(AssertionError):
        check(folder)


def test_another_corpus_or_an_existing_folder_is_refused(made):
    root, _ = made
    with pytest.raises(FileExistsError, match="exists already"):
        ship.ship(root / "runs", root / "corpus", root / "cram-code")
    write_corpus(root / "other", [(str(i), f"x = {i}\n" * 200) for i in range(9)], vocab_size=260)
    with pytest.raises(ValueError, match="is not the text that ship-seed0 was trained on"):
        ship.ship(root / "runs", root / "other", root / "new")
