import json
import os

import pytest

from cramlab.errors import TextError
from cramlab.text import Corpus, Document, read_corpus


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
    with pytest.raises(TextError, match=r"does not exist.*stdlib or prose"):
        read_corpus(str(tmp_path / "none"))
    with pytest.raises(TextError, match="holds no document"):
        read_corpus(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match=r"a\.txt, line 1: is not UTF-8"):
        read_corpus(str(tmp_path))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"txt": "y"}')
    with pytest.raises(TextError, match=r"b\.jsonl, line 2"):
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
        (b'{"txt": "a", "b": 1}', 'has no field "text" but only txt, b; .*--text-field'),
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
    with pytest.raises(TextError, match=rf"d\.jsonl, line 3: {message}"):
        read_corpus(str(path))


def test_a_text_file_is_text_or_named_with_its_line(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read_corpus(str(path)).documents == (Document("d.txt:0", "one\ntwo\nthree"),)
    utf_16 = "a\n".encode("utf-16")
    for held, message in ((b"one\n\ntwo\0", r"line 3: holds a NUL at byte 8"), (utf_16, "line 1: is not UTF-8")):
        path.write_bytes(held)
        with pytest.raises(TextError, match=message):
            read_corpus(str(path))
    for held in (b"", b" \n\t"):
        path.write_bytes(held)
        with pytest.raises(TextError, match="holds no document; all texts are blank"):
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
    with pytest.raises(TextError, match=r"b\.txt is not a regular file"):
        read_corpus(str(tmp_path))
    with pytest.raises(TextError, match=r"b\.txt is not a regular file|b\.txt\" does not exist"):
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
        with pytest.raises(TextError, match=r"holds 5\.0 GiB of text"):
            read_corpus(str(given))


def test_names_that_are_no_text_are_written_as_escapes(tmp_path, monkeypatch):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a")
    corpus = read_corpus(str(tmp_path))
    assert corpus.documents == (Document("\\xff.txt", "a"),)
    assert len(corpus.digest) == 16
    monkeypatch.chdir(tmp_path)
    assert read_corpus(".").name == tmp_path.name
