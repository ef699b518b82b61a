"""Bad texts: JSON Lines and plain files that follow the standards are read, and other files are refused."""

from __future__ import annotations

import codecs
import functools
import json
import random
import shutil
from collections.abc import Iterator

from cramlab.errors import TextError
from cramlab.text import read_corpus
from faults.bad_settings import thinned
from faults.cases import Case, Fault, FaultFoundError, RefusedError
from faults.material import fresh, words


def cases(seed: int, share: float) -> Iterator[Case]:
    """Files that must be read as they are, and files that must be refused."""
    yield from thinned(list(_texts(seed)), share, seed)


def _texts(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    plain = [words(rng, 40).strip() for _ in range(3)]
    odd = ["a\u2028b", "c\u2029d", "e\u0085f", "g\x0bh", "i\x0cj", "k\x1cl", "tab\there", "é ü 漢字 🙂", "\u0000"]
    right = {
        "plain": (json_lines(plain), plain),
        "odd characters as they are": (json_lines(odd), odd),
        "odd characters escaped": (json_lines(odd, ascii_only=True), odd),
        "byte-order mark": (codecs.BOM_UTF8 + json_lines(plain), plain),
        "CRLF": (json_lines(plain).replace(b"\n", b"\r\n"), plain),
        "empty lines": (json_lines(plain).replace(b"\n", b"\n\n"), plain),
        "no last line end": (json_lines(plain).rstrip(b"\n"), plain),
        "spaces around": (b"  " + json_lines(plain[:1]).strip() + b"  \n", plain[:1]),
        "more fields": (b'{"id": 1, "text": "x", "meta": {"a": [1]}}\n', ["x"]),
        "surrogate pairs": (b'{"text": "\\ud83d\\ude42"}\n', ["🙂"]),
    }
    for name, (data, wanted) in right.items():
        yield Case("texts", f"jsonl: {name}", functools.partial(_corpus, "x.jsonl", data, wanted))
    refused = {
        "null": b'{"text": null}\n', "a number": b'{"text": 5}\n', "a list": b'{"text": ["x"]}\n',
        "no text": b'{"texts": "x"}\n', "an array a line": b'["x"]\n', "a string a line": b'"x"\n',
        "no JSON": b"hello\n", "one bad line": json_lines(plain) + b"{\n", "a lone surrogate": b'{"text": "\\ud800"}\n',
        "not UTF-8": b'{"text": "\xff"}\n', "UTF-16": '{"text": "x"}\n'.encode("utf-16"), "nothing": b"",
        "only spaces": b" \n \n", "an array of objects": b'[{"text": "x"}]\n', "NaN": b'{"text": NaN}\n',
        "nesting": b"[" * 100_000, "two on a line": b'{"text": "x"} {"text": "y"}\n', "cut": json_lines(plain)[:-9],
        "empty texts": json_lines(["", " "]),
    }  # fmt: skip
    for name, data in refused.items():
        yield Case("texts", f"jsonl refused: {name}", functools.partial(_corpus, "x.jsonl", data, None))
    files = {
        "one text": (b"hello", ["hello"]), "two texts": (b"a\n<|endoftext|>\nb", ["a", "b"]),
        "byte-order mark": (codecs.BOM_UTF8 + b"hello", ["hello"]), "CRLF": (b"a\r\nb", ["a\nb"]),
    }  # fmt: skip
    for name, (data, wanted) in files.items():
        yield Case("texts", f"txt: {name}", functools.partial(_corpus, "x.txt", data, wanted))
    bad = {"not UTF-8": b"\xff\xfehello", "nothing": b"", "spaces": b"  \n", "a picture": b"\x89PNG\r\n\x1a\n\xff",
           "UTF-16": "hello".encode("utf-16")}  # fmt: skip
    for name, data in bad.items():
        yield Case("texts", f"txt refused: {name}", functools.partial(_corpus, "x.txt", data, None))


def json_lines(texts: list[str], *, ascii_only: bool = False) -> bytes:
    """One object a line, with its text under "text"."""
    return "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()


def _corpus(name: str, data: bytes, wanted: list[str] | None) -> None:
    """Reads a file of texts; None: it must be refused."""
    path = fresh("text", name)
    path.write_bytes(data)
    try:
        found = [document.text.strip("\n") for document in read_corpus(str(path)).documents]
    except TextError as error:
        if wanted is not None:
            raise FaultFoundError(Fault.WRONG, f"refused, which is wrong: {error}"[:240]) from error
        raise RefusedError(str(error)) from error
    finally:
        shutil.rmtree(path.parent)
    if wanted is None:
        raise FaultFoundError(Fault.ACCEPTED, f"read as {found!r}"[:200])
    if [text.replace("\r\n", "\n") for text in found] != wanted:
        raise FaultFoundError(Fault.WRONG, f"read as {found!r}, not {wanted!r}"[:240])
