"""Corpus folders: what is written is what is read, and damage is refused."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cramlab.config import ConfigError
from cramlab.files import DamagedFileError
from cramlab.language_model import corpus
from cramlab.language_model.corpus import BEGIN, PARTS, split_by_document, write_corpus
from cramlab.language_model.text import PreparedText, held_out_windows, open_corpus, random_windows

VOCAB = 280


def documents(n: int = 40) -> list[tuple[str, str]]:
    draw = random.Random(0)
    words = ["one", "two", "three", "four", "five", BEGIN, "é", "\n"]
    return [(f"d{i}", f"document {i} " + " ".join(draw.choices(words, k=60))) for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpora") / "words"
    write_corpus(path, documents(), vocab_size=VOCAB, about={"name": "words"})
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def texts_of(folder: Path, part: str) -> list[str]:
    text, files = open_corpus(folder), corpus.check_files(folder)
    tokens = files.tokens(part).tolist()
    starts = [*files.starts(part).tolist(), len(tokens)]
    assert all(tokens[start] == files.about["begin_token"] for start in starts[:-1])
    return [text.tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(starts)]


def test_every_document_is_in_one_part_and_decodes_to_itself(folder: Path) -> None:
    found = [text for part in PARTS for text in texts_of(folder, part)]
    assert sorted(found) == sorted(text for _, text in documents())


def test_a_document_that_spells_the_mark_begins_no_other(folder: Path) -> None:
    files = corpus.check_files(folder)
    n_begin = sum(int((files.tokens(part).int() == files.about["begin_token"]).sum()) for part in PARTS)
    assert n_begin == len(documents())


def test_the_parts_are_described_and_together_have_one_digest(folder: Path) -> None:
    text = open_corpus(folder)
    about = json.loads((folder / "corpus.json").read_text())
    for part, tokens in (("train", text.train), ("validation", text.validation), ("test", text.held_out)):
        assert about["parts"][part]["tokens"] == len(tokens)
    assert text.digest == corpus.digest_of(about)
    assert len(text.digest) == 64


def test_tokens_are_mapped_and_writing_to_them_leaves_the_file(copy: Path) -> None:
    before = (copy / "train.bin").read_bytes()
    tokens = open_corpus(copy).train
    assert tokens.dtype == torch.uint16
    tokens[0] = 7
    assert (copy / "train.bin").read_bytes() == before


def test_windows_of_a_corpus_are_those_of_the_same_tokens_in_memory(folder: Path) -> None:
    text = open_corpus(folder)
    ints = PreparedText(None, text.train.int(), text.held_out.int(), text.validation.int())
    assert torch.equal(random_windows(text.train, 16, 5, 3), random_windows(ints.train, 16, 5, 3))
    assert random_windows(text.train, 16, 5, 3).dtype == torch.int64
    for part, stream in (("test", text.held_out), ("validation", text.validation)):
        windows = held_out_windows(text, part, 16, 4)
        assert torch.equal(windows, held_out_windows(ints, part, 16, 4))
        assert windows.flatten().tolist() == stream[:64].tolist()


def test_the_same_documents_and_seed_make_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "again", documents(), vocab_size=VOCAB, about={"name": "words"})
    write_corpus(tmp_path / "other", documents(), vocab_size=VOCAB, seed=1)
    names = sorted(file.name for file in folder.iterdir())
    assert all((folder / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    assert open_corpus(tmp_path / "other").digest != open_corpus(folder).digest


def test_the_split_holds_whole_documents_and_at_most_a_tenth_of_the_characters() -> None:
    named = documents(200)
    parts = split_by_document(named, seed=0)
    sizes = {part: sum(len(text) for _, text in parts[part]) for part in PARTS}
    longest = max(len(text) for _, text in named)
    assert sorted(document for part in PARTS for document in parts[part]) == sorted(named)
    for part in ("validation", "test"):
        assert abs(sizes[part] - 0.1 * sum(sizes.values())) <= longest
    assert [len(split_by_document(named[:3], 0)[part]) for part in PARTS] == [1, 1, 1]


def test_the_number_of_training_tokens_can_be_bounded(folder: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "short", documents(), vocab_size=VOCAB, max_train_tokens=1000)
    short, full = open_corpus(tmp_path / "short"), open_corpus(folder)
    assert 800 < len(short.train) <= 1000 < len(full.train)
    assert torch.equal(short.train.int(), full.train[: len(short.train)].int())
    assert torch.equal(short.held_out.int(), full.held_out.int())


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "validation.starts.npy", "tokenizer.json"])
def test_an_altered_file_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(DamagedFileError, match=f"{name} was altered"):
        open_corpus(copy)


def test_cut_missing_and_foreign_files_are_refused(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(data[:-2])
    with pytest.raises(DamagedFileError, match=r"train\.bin has .* bytes instead of"):
        open_corpus(copy)
    (copy / "train.bin").unlink()
    with pytest.raises(DamagedFileError, match=r"train\.bin is missing"):
        open_corpus(copy)
    (copy / "corpus.json").write_text('{"kind": "corpus", "format": 99}')
    with pytest.raises(DamagedFileError, match="format 1"):
        open_corpus(copy)
    (copy / "corpus.json").write_text('{"kind": "corpus", "format": 1}')
    with pytest.raises(DamagedFileError, match="does not describe all files"):
        open_corpus(copy)
    (copy / "corpus.json").write_text("{")
    with pytest.raises(DamagedFileError, match="damaged"):
        open_corpus(copy)
    with pytest.raises(DamagedFileError, match=r"holds no corpus\.json"):
        open_corpus(tmp_path_factory.mktemp("empty"))


def test_an_interrupted_build_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_write_ids", stop)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "words", documents(), vocab_size=VOCAB)
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        write_corpus(folder, documents(), vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="vocab_size = 70000"):
        write_corpus(tmp_path / "a", documents(), vocab_size=70_000)
    with pytest.raises(ConfigError, match="too large for this text"):
        write_corpus(tmp_path / "a", documents(), vocab_size=60_000)
    with pytest.raises(ConfigError, match="at least 3"):
        write_corpus(tmp_path / "a", documents(2), vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="max_train_tokens = 5"):
        write_corpus(tmp_path / "a", documents(), vocab_size=VOCAB, max_train_tokens=5)


def test_starts_are_mapped(folder: Path) -> None:
    starts = corpus.check_files(folder).starts("train")
    assert isinstance(starts, np.memmap)
    assert starts[0] == 0
