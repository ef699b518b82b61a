"""Plain text of documentation, and what a corpus leaves out."""

import random
from pathlib import Path

import pytest

from cramlab.errors import UsageError
from cramlab.text import Document
from reproduction.protocols import corpora
from reproduction.protocols.corpora import Distinct
from reproduction.sources import plain_text
from reproduction.sources.code import read_code
from reproduction.sources.source import Source


def test_rst_keeps_words_and_arguments_and_drops_marks() -> None:
    text = """:mod:`json` --- JSON encoder
============================

.. module:: json
   :synopsis: Encode.

.. _target:

The function :func:`~json.dumps` of `the page <https://json.org>`_ writes ``null``, **never** ``None``.

.. function:: dump(obj, fp)

   Writes.
"""
    assert plain_text.from_rst(text) == (
        "json --- JSON encoder\n\njson\n\nThe function json.dumps of the page writes null, never None.\n\n"
        "dump(obj, fp)\n\n   Writes.\n"
    )


def test_pod_resolves_codes_inside_codes_and_escapes() -> None:
    text = "=head1 NAME\n\nUse B<bold C<code>>, L<the page|perlop>, C<< a->b >> and E<lt>tag E<gt>.X<index>\n\n=cut\n"
    assert plain_text.from_pod(text) == "NAME\n\nUse bold code, the page, a->b and <tag >.\n"


def test_html_leaves_out_navigation_and_keeps_preformatted_lines() -> None:
    text = (
        "<html><head><title>t</title></head><body><div class='navheader'><p>Up<br>Next</p></div>"
        "<p>Some   words,\n&amp; more.</p><pre>a  b\n  c</pre></body></html>"
    )
    assert plain_text.from_html(text) == "Some words, & more.\n\na  b\n  c\n"


def test_wiki_drops_templates_tables_and_files_and_keeps_link_texts() -> None:
    box, table, file = "{{Box|{{inner}}}}\n", "\n{|\n|x\n|}", "[[File:a.png|b [[c]]]]"
    text = f"{box}'''Ada''' was [[Person|a person]] of [[London]].<ref>x</ref>{file}{table}"
    assert plain_text.from_wiki(text) == "Ada was a person of London.\n"


def test_wikipedia_pages_leave_out_redirections_and_other_namespaces() -> None:
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>words</text></revision></page>"
    pages = [page.format("A", 0, ""), page.format("B", 0, '<redirect title="A" />'), page.format("C", 10, "")]
    dump = f'<mediawiki xmlns="http://x/">{"".join(pages)}</mediawiki>'.encode()
    assert list(plain_text.wikipedia_pages(dump)) == [("A", "words\n")]
    assert list(plain_text.wikipedia_pages(dump[:-40])) == [("A", "words\n")]  # a dump that was cut


def test_copies_short_and_long_documents_are_left_out_and_counted() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    near = text.replace("word50", "changed")
    other = " ".join(f"else{i}" for i in range(100))
    distinct = Distinct()
    distinct.add(
        Document(name, t) for name, t in zip("abcde", (text, near, other, "a few", "x" * 500_000), strict=True)
    )
    assert [document.name for document in distinct.documents] == ["a", "c"]
    assert distinct.left_out == {"copies": 1, "short": 1, "long": 1}


def test_code_names_what_is_not_installed_before_it_reads() -> None:
    with pytest.raises(UsageError, match="no-such-package is not installed"):
        next(read_code(["no-such-package"]))


def test_code_holds_the_library_and_a_package_with_versions() -> None:
    stdlib, package = read_code(["iniconfig"])
    assert stdlib.name == "stdlib"
    assert any(document.name == "stdlib/json/encoder.py" for document in stdlib.documents)
    assert any(document.name == "iniconfig/__init__.py" for document in package.documents)
    assert package.described()["licence"] == "MIT"


def source(name: str, seed: int) -> Source:
    draw = random.Random(seed)
    words = [f"{name}{i}" for i in range(300)]
    texts = [" ".join(draw.choices(words, k=80)) for _ in range(20)]
    return Source(name, "1.0", "MIT", tuple(Document(f"{name}/{i}", text) for i, text in enumerate(texts)))


def test_the_command_builds_a_corpus_once_and_then_checks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = source("first", 0)
    monkeypatch.setattr(corpora, "read_code", lambda _packages: iter([first, source("second", 1), first]))
    folder = tmp_path / "code"

    def run(*options: str) -> int:
        command = ["corpora", str(folder), "--corpus", "code", "--packages", "second", "--vocab", "280", *options]
        monkeypatch.setattr("sys.argv", command)
        return corpora.main()

    assert run() == 0
    files = corpora.check_files(folder)
    assert files.about["left_out"] == {"copies": 20, "short": 0, "long": 0}
    assert [(s["name"], s["files"], s["files_kept"]) for s in files.about["sources"]] == [
        ("first", 20, 20),
        ("second", 20, 20),
        ("first", 20, 0),
    ]
    assert sum(files.about["parts"][part]["documents"] for part in corpora.PARTS) == 40
    monkeypatch.setattr(corpora, "read_code", None)  # a finished folder is not built again
    assert run() == 0
    assert "280 tokens in the vocabulary" in capsys.readouterr().out
    assert run("--seed", "1") == 2
    assert "was built with seed = 0" in capsys.readouterr().err
    (folder / "test.bin").write_bytes(b"")
    assert run() == 1
    assert "test.bin has 0 bytes" in capsys.readouterr().err
