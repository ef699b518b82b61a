import json
import os

import pytest
import torch

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.split import count_tokens, cut, split
from cramlab.auditing.text import Corpus, Document, read_corpus
from cramlab.errors import AuditError

CONFIG = AuditConfig(context=8, contexts_per_document=2, fit_tokens=100, validation_tokens=20, test_tokens=40)


def lengths(*ns):
    return [torch.arange(n) + 100 * i for i, n in enumerate(ns)]


def test_documents_are_cut_into_whole_contexts():
    found = cut(lengths(7, 8, 17, 90), CONFIG)
    assert [(c.document, tuple(c.tokens.shape)) for c in found] == [(1, (1, 8)), (2, (2, 8)), (3, (2, 8))]
    assert found[1].tokens.flatten().tolist() == list(range(200, 216))
    assert [tuple(b.shape) for b in found[1].batches(8)] == [(1, 8), (1, 8)]
    assert [tuple(b.shape) for b in found[1].batches(4)] == [(1, 8), (1, 8)]
    assert [tuple(b.shape) for b in found[1].batches(999)] == [(2, 8)]


def test_parts_share_no_document_and_depend_on_the_seed_alone():
    texts = lengths(*[20] * 30)
    parts = split(texts, CONFIG, n_features=10)
    names = [{c.document for c in part} for part in (parts.fit, parts.validation, parts.test)]
    assert sum(map(len, names)) == len(set.union(*names))
    assert [count_tokens(p) for p in (parts.fit, parts.validation, parts.test)] == [112, 32, 48]
    again = split(texts, CONFIG, n_features=10)
    assert [c.document for c in again.fit] == [c.document for c in parts.fit]
    other = split(texts, AuditConfig(**vars(CONFIG) | {"seed": 1}), n_features=10)
    assert [c.document for c in other.fit] != [c.document for c in parts.fit]


def test_too_little_text_is_refused_with_the_reason():
    with pytest.raises(AuditError, match="shorter than a context: the longest has 7 tokens"):
        split(lengths(7, 3), CONFIG, 5)
    with pytest.raises(AuditError, match="2 documents are too few"):
        split(lengths(20, 20), CONFIG, 5)
    with pytest.raises(AuditError, match=r"112 tokens for fitting, fewer tokens than features .200"):
        split(lengths(*[20] * 30), CONFIG, 200)


def test_scarce_text_is_shared_out():
    parts = split(lengths(*[16] * 8), AuditConfig(context=8), n_features=5)
    assert [len(p) for p in (parts.fit, parts.validation, parts.test)] == [5, 1, 2]


def test_packaged_text_is_there_and_the_same_each_time():
    stdlib, prose = read_corpus("stdlib"), read_corpus("prose")
    names = [document.name for document in stdlib.documents]
    assert "json/decoder.py" in names
    assert not any("test" in name.split("/") or name.startswith("encodings/") for name in names)
    assert len(stdlib.documents) > 300
    assert len(prose.documents) > 50
    assert stdlib.digest == read_corpus("stdlib").digest != prose.digest
    assert stdlib.version.startswith("python 3")


def test_folders_and_files_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "two.md").write_text("two")
    (tmp_path / "image.png").write_bytes(b"\xff")
    assert read_corpus(str(tmp_path)).documents == (Document("a/one.txt", "one"), Document("two.md", "two"))
    lines = tmp_path / "d.jsonl"
    lines.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": "y"}))
    assert [d.text for d in read_corpus(str(lines)).documents] == ["x", "y"]
    parted = tmp_path / "d.txt"
    parted.write_text("x<|endoftext|>y<|endoftext|>")
    assert [d.text for d in read_corpus(str(parted)).documents] == ["x", "y"]
    assert Corpus("a", (Document("n", "x"),)).digest != Corpus("a", (Document("n", "y"),)).digest


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(AuditError, match=r"does not exist.*stdlib or prose"):
        read_corpus(str(tmp_path / "none"))
    with pytest.raises(AuditError, match="holds no document"):
        read_corpus(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(AuditError, match=r"a\.txt, line 1: is not UTF-8"):
        read_corpus(str(tmp_path))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"txt": "y"}')
    with pytest.raises(AuditError, match=r"b\.jsonl, line 2"):
        read_corpus(str(tmp_path / "b.jsonl"))


def test_lines_of_json_may_hold_any_character_a_mark_and_blank_lines(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\u2029f", "g\u000bh\x1ci", "\U0001f600"]
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for end in ("\n", "\r\n", "\n\n", "\n \n"):
        path.write_bytes(b"\xef\xbb\xbf" + (end.join(lines) + end).encode())
        assert [d.text for d in read_corpus(str(path)).documents] == texts
    path.write_bytes(json.dumps({"text": texts[-1]}).encode())  # as a pair of escapes
    assert read_corpus(str(path)).documents == (Document("d.jsonl:0", texts[-1]),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": null}', '"text" is null and not a string'),
        (b'{"text": 1}', '"text" is 1 and not a string'),
        (b'["a"]', "is not a JSON object .* a list"),
        (b'{"txt": "a", "b": 1}', 'is not a JSON object with a field "text" but has only txt, b'),
        (b'{"text": "a"', "is not JSON"),
        (b'{"text": "a", "p": NaN}', "is not JSON .*NaN"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "\xe9"}', "is not UTF-8 text .* at byte 10"),
        (b'{"text": "\\ud800"}', '"text" holds half of a surrogate pair'),
    ],
)
def test_a_line_that_holds_no_text_is_named(line, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}')
    with pytest.raises(AuditError, match=rf"d\.jsonl, line 3: {message}"):
        read_corpus(str(path))


def test_a_text_file_is_text_or_named_with_its_line(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read_corpus(str(path)).documents == (Document("d.txt:0", "one\ntwo\nthree"),)
    utf_16 = "a\n".encode("utf-16")
    for held, message in ((b"one\n\ntwo\0", r"line 3: holds a NUL at byte 8"), (utf_16, "line 1: is not UTF-8")):
        path.write_bytes(held)
        with pytest.raises(AuditError, match=message):
            read_corpus(str(path))
    for held in (b"", b" \n\t"):
        path.write_bytes(held)
        with pytest.raises(AuditError, match="holds no document; the file is blank"):
            read_corpus(str(path))


def pipe(path):
    os.mkfifo(path)


def link_to_itself(path):
    path.symlink_to(path.name)


def link_to_nothing(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [pipe, link_to_itself, link_to_nothing])
def test_what_is_no_file_is_named_instead_of_waited_for(make, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "round").symlink_to(tmp_path)
    assert [d.name for d in read_corpus(str(tmp_path)).documents] == ["a.txt"]
    make(tmp_path / "b.txt")
    with pytest.raises(AuditError, match=r"b\.txt is not a regular file"):
        read_corpus(str(tmp_path))
    with pytest.raises(AuditError, match=r"b\.txt is not a regular file|b\.txt\" does not exist"):
        read_corpus(str(tmp_path / "b.txt"))


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        read_corpus(str(tmp_path))


def test_more_text_than_memory_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    os.truncate(path, 5 * 2**30)
    for given in (path, tmp_path):
        with pytest.raises(AuditError, match=r"holds 5\.0 GiB of text"):
            read_corpus(str(given))


def test_names_that_are_no_text_are_written_as_escapes(tmp_path, monkeypatch):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a")
    corpus = read_corpus(str(tmp_path))
    assert corpus.documents == (Document("\\xff.txt", "a"),)
    assert len(corpus.digest) == 16
    monkeypatch.chdir(tmp_path)
    assert read_corpus(".").name == tmp_path.name


@pytest.mark.parametrize(
    ("field", "value"),
    [("context", 3), ("fit_tokens", 0), ("seed", -1), ("strengths", ()), ("strengths", (0.0,)),
     ("replaced_fracs", (1.0,)), ("replaced_fracs", ()), ("strengths", (0.5, float("nan"))),
     ("confidence", 1.0), ("layers", ()), ("layers", (-1,))],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"audit\.{field} = "):
        AuditConfig(**{field: value})
