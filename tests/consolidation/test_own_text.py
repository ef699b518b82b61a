"""A newcomer's text, without any setting: one book, short files, short chats; what is chosen, said and kept."""

import contextlib
import dataclasses
import itertools
import json
import random
import re
import shutil

import pytest
import torch

import cramlab
from cramlab.cli.main import main
from cramlab.config import ConfigError
from cramlab.consolidation import plan
from cramlab.consolidation.config import HELD_OUT, PARTS, ConsolidationConfig
from cramlab.consolidation.documents import parts_of
from cramlab.consolidation.estimate import forward_passes, in_words
from cramlab.consolidation.folder import RECORD
from cramlab.consolidation.pieces import n_usable
from cramlab.consolidation.plan import planned
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import load
from cramlab.text import Corpus, Document, read_corpus
from faults.material import model_folder, words

FREE = {field.name for field in dataclasses.fields(ConsolidationConfig)}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama of two layers whose tokens are bytes and whose context is 128, with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(model_folder(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def pretrained(model):
    return load(str(model))


def corpus_of(n_documents, letters=600, seed=0):
    rng = random.Random(seed)
    return Corpus("own", tuple(Document(str(i), words(rng, letters)[:letters]) for i in range(n_documents)))


def long_text(letters, seed=1):
    rng = random.Random(seed)
    return "".join(words(rng, 500) for _ in range(letters // 500))


def book(folder):
    (folder / "book.txt").write_text(long_text(1_000_000))
    return [str(folder / "book.txt")]


def short_files(folder):
    rng = random.Random(2)
    (folder / "notes").mkdir()
    for i in range(88):
        (folder / "notes" / f"{i}.md").write_text(words(rng, 130)[: rng.randrange(90, 125)])
    return [str(folder / "notes")]


def chats(folder):
    rng = random.Random(3)
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(6000):
            pair = [{"role": role, "content": words(rng, 40)[: rng.randrange(5, 40)]} for role in ("user", "assistant")]
            file.write(json.dumps({"id": i, "messages": pair}) + "\n")
    return [str(folder / "chats.jsonl")]


@pytest.mark.parametrize(
    ("make", "unit", "said"),
    [
        (book, "piece", "book.txt has one document; 208 pieces of 128 tokens are used"),
        (short_files, "document", "notes has 88 documents; 88 documents of 32 to 128 tokens are used"),
        (chats, "document", "conversations go through the tokenizer's chat template"),
    ],
)
def test_it_works_with_no_setting_and_says_first_what_is_promised(make, unit, said, model, tmp_path, capsys):
    text, out = make(tmp_path), tmp_path / "out"
    argv = [
        "consolidate",
        str(model),
        "--text",
        *text,
        "--max-loss-increase",
        "0.5",
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert said in shown
    before = shown.partition("tokens, ")[0]  # the first line of progress
    assert re.search(
        r"^guarantee: at most 0\.5 nats per token with confidence 0\.9\. \d+ (pieces|documents) can", before, re.M
    )
    assert re.search(r"^time: about \d", before, re.M)
    record = json.loads((out / RECORD).read_text())
    on = record["calibrated_on"]
    assert (on["unit"], on["contexts"]) == (unit, record["config"]["calibration_documents"])
    assert (
        ("weaker" in on) == (unit == "piece") == ("weaker guarantee: it rests on 64 pieces of one document" in before)
    )
    if unit == "piece":
        assert shown.count(on["weaker"]) == 2  # before the work and beside the result
    assert on["shortest"] == 128 or on["shortest"] < on["longest"]
    assert main([*argv, "--resume"]) == 0  # the same choice, so the same folder
    assert cramlab.skip_counts(cramlab.load_consolidated(str(model), out)).live


def test_a_text_with_enough_documents_changes_nothing(pretrained):
    config = ConsolidationConfig(context=128, window=16)
    corpus = corpus_of(220)
    assert planned(pretrained, corpus, config, free=FREE, increase=0.02).config == config
    found = planned(pretrained, corpus, ConsolidationConfig(), free=FREE, increase=0.02).config
    assert found == config  # the model's context is 128


def test_fewer_documents_tell_the_cost_of_more_layers_each(pretrained, monkeypatch):
    for n_layers, wanted in ((30, 20), (9, 9), (2, 8)):
        monkeypatch.setattr(plan, "attention_sites", lambda _, n=n_layers: range(n))
        found = planned(pretrained, corpus_of(88), ConsolidationConfig(), free=FREE, increase=0.02).config
        assert found.sensitivity_documents == 5
        assert found.layers_per_document == wanted


def test_what_is_set_stays_and_the_rest_is_shared_out(pretrained):
    config = ConsolidationConfig(context=128, window=16, calibration_documents=50, test_documents=5)
    fixed = {"context", "window", "calibration_documents", "test_documents"}
    found = planned(pretrained, corpus_of(90), config, free=FREE - fixed, increase=0.02).config
    assert (found.calibration_documents, found.test_documents) == (50, 5)
    assert sum(getattr(found, f"{part}_documents") for part in PARTS) == pytest.approx(90, abs=3)
    lacking = planned(pretrained, corpus_of(90), config, free=set(), increase=0.02).config
    with pytest.raises(ConsolidationError, match="are needed"):
        parts_of(pretrained, corpus_of(90), lacking)


@pytest.mark.parametrize("n", [24, 30, 40, 88, 150])
def test_scarce_documents_calibrate_first_and_every_part_has_its_least(n, pretrained):
    found = planned(pretrained, corpus_of(n), ConsolidationConfig(), free=FREE, increase=0.02)
    config, corpus = found.config, corpus_of(n)
    assert config.unit == ("piece" if n < 40 else "document")  # 600 letters are some pieces each
    parts = parts_of(pretrained, corpus, config)
    sizes = {part: len(parts[part]) for part in PARTS}
    assert all(sizes[part] >= least for part, least in (plan._LEAST | {"calibration": 12}).items())
    if config.unit == "document":
        assert n - 3 <= sum(sizes.values()) <= n
        assert sizes["calibration"] >= min(64, int(0.4 * n))


def test_too_little_text_is_refused_with_what_would_do(pretrained):
    with pytest.raises(ConsolidationError, match="the text has 9 documents of at least 32 tokens, but 24 are needed"):
        planned(pretrained, corpus_of(9, 60), ConsolidationConfig(), free=FREE, increase=0.02)
    with pytest.raises(ConsolidationError, match=r"48 are needed \(of which 36 calibration were asked for\)"):
        planned(pretrained, corpus_of(40, 60), ConsolidationConfig(calibration_documents=36),
                free=FREE - {"calibration_documents"}, increase=0.02)  # fmt: skip


def test_short_documents_are_contexts_by_themselves_and_more_of_them_are_used(pretrained):
    corpus = corpus_of(1500, 60)
    found = planned(pretrained, corpus, ConsolidationConfig(), free=FREE, increase=0.02).config
    assert (found.shortest, found.window, found.unit) == (32, 16, "document")
    assert found.calibration_documents > 2 * 64
    parts = parts_of(pretrained, corpus, found)
    assert all(len(tokens) == 60 for part in PARTS for tokens in parts[part])
    assert {len(tokens) for tokens in parts["learning"]} == {60}


def test_where_most_documents_are_shorter_than_the_window_it_shrinks(pretrained):
    found = planned(pretrained, corpus_of(400, 24), ConsolidationConfig(), free=FREE, increase=0.02).config
    assert (found.window, found.shortest) == (8, 16)


def test_a_few_long_documents_among_many_short_ones_are_not_all_that_counts(pretrained):
    mixed = Corpus("mixed", (*corpus_of(230).documents, *corpus_of(900, 60, seed=9).documents))
    found = planned(pretrained, mixed, ConsolidationConfig(), free=FREE, increase=0.02).config
    assert found.shortest == 32
    kept = planned(
        pretrained, mixed, ConsolidationConfig(context=128, window=16), free=FREE - {"shortest"}, increase=0.02
    )
    assert kept.config.shortest == 0


def places(parts, tokens):
    """Where the contexts of each part begin in a text of distinct tokens."""
    whole = {tuple(piece.tolist()): i for i, piece in enumerate(tokens.split(128))}
    return {part: sorted(whole[tuple(context.tolist())] for context in parts[part]) for part in parts}


def test_parts_of_one_document_are_blocks_apart_from_each_other(pretrained):
    text = long_text(60_000)
    corpus = Corpus("book", (Document("book", text),))
    config = planned(pretrained, corpus, ConsolidationConfig(), free=FREE, increase=0.02).config
    assert config.unit == "piece"
    parts = parts_of(pretrained, corpus, config)
    where = places(parts, torch.tensor(pretrained.encode(text)))
    for before, after in itertools.pairwise(PARTS):
        assert where[before][-1] + n_apart(text) < where[after][0]
    held_out = {i for part in HELD_OUT for i in where[part]}
    assert min(where["learning"]) > max(held_out)
    assert {*where["gate"], *where["sensitivity"], *where["fit"]} <= set(where["learning"])
    calibration = where["calibration"]
    assert calibration[-1] - calibration[0] >= len(calibration) - 1  # spread over their block


def n_apart(text):
    n_pieces = len(text) // 128
    return (n_pieces - n_usable(n_pieces)) // (len(PARTS) - 1) - 1


def test_a_book_learned_from_in_part_is_no_text_to_calibrate_on_again(model, tmp_path, capsys):
    text, out = book(tmp_path)[0], tmp_path / "out"
    small = [f"--set={name}=2" for name in ("local_steps", "end_steps")]
    argv = ["consolidate", str(model), "--text", text, "--max-loss-increase", "0.5", "--threads", "1"]
    assert main([*argv, "--out", str(out), *small]) == 0
    again = [*argv, "--from", str(out)]
    assert main([*again, "--out", str(tmp_path / "same")]) == 0  # the same draw
    assert json.loads((tmp_path / "same" / RECORD).read_text())["calibrated_on"]["unit"] == "piece"
    capsys.readouterr()
    assert main([*again, "--out", str(tmp_path / "other"), "--set", "seed=3"]) == 2
    assert "has 0 pieces" in capsys.readouterr().err


def test_settings_of_short_documents_are_checked():
    with pytest.raises(ConfigError, match=r"consolidation\.shortest = 69 must be above 69"):
        ConsolidationConfig(shortest=69)
    with pytest.raises(ConfigError, match="at most the context, 1024"):
        ConsolidationConfig(shortest=2000)
    assert ConsolidationConfig(shortest=100).least_tokens == 100
    assert ConsolidationConfig().least_tokens == 1024


def test_the_time_follows_from_the_work():
    tokens = torch.zeros(100)
    parts = {part: [tokens] * 10 for part in (*PARTS, "learning")}
    config = ConsolidationConfig(local_steps=0, end_steps=0)
    less = forward_passes(config, parts, learned=True)
    assert less == pytest.approx(1000 * (1.5 * 4 + 2.5 + 1.3 * 8 + 2 + 1.3 * 8 + 1 + 1.3 * 4 + 1 + 1.3))
    steps = dataclasses.replace(config, end_steps=10, batch_contexts=2)
    assert forward_passes(steps, parts, learned=True) - less == pytest.approx(7 * 10 * 2 * 100)
    assert forward_passes(config, parts, learned=False) < less
    assert [in_words(s) for s in (0.2, 89, 600, 7200)] == ["1 seconds", "89 seconds", "10 minutes", "2.0 hours"]


def test_python_takes_a_list_of_texts_and_says_what_it_chose(pretrained, tmp_path):
    lines = []
    with contextlib.suppress(ConsolidationError):
        cramlab.consolidate(pretrained, ["one text"], tmp_path / "out", log=lines.append)
    texts = [document.text for document in corpus_of(60, 60).documents]
    record = cramlab.consolidate(pretrained, texts, tmp_path / "out", max_loss_increase=0.5, log=lines.append,
                                 local_steps=2, end_steps=2)  # fmt: skip
    assert record["calibrated_on"]["shortest"] == 60
    assert [line.partition(":")[0] for line in lines] == ["text", "guarantee", "time"]
    assert record["text"]["digest"] == read_corpus_digest(texts)


def read_corpus_digest(texts):
    return Corpus("texts", tuple(Document(f"text {i}", one) for i, one in enumerate(texts))).digest


def test_empty_duplicate_and_binary_files_are_left_out_or_named(model, tmp_path, capsys):
    (folder,) = short_files(tmp_path)
    (tmp_path / "notes" / "empty.md").touch()
    shutil.copy(tmp_path / "notes" / "1.md", tmp_path / "notes" / "copy.md")
    assert len(read_corpus(folder).documents) == 89
    argv = ["consolidate", str(model), "--text", folder, "--out", str(tmp_path / "out"), "--max-loss-increase", "0.5",
            "--set", "local_steps=0", "--set", "end_steps=0", "--threads", "1"]  # fmt: skip
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "1 blank documents are left out" in shown
    assert "notes has 89 documents; 88 documents of" in shown
    (tmp_path / "notes" / "picture.md").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main([*argv[:4], "--out", str(tmp_path / "other")]) == 2
    assert "picture.md, line 1: is not UTF-8 text (invalid start byte at byte 0)" in capsys.readouterr().err
