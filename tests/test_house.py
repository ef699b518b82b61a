"""Rules for every source file: length, docstrings, numbers and spelling; `lint-imports` checks the imports."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / name for name in ("src", "reproduction", "benchmarks", "faults")]
FILES = sorted(path for room in ROOMS for path in room.rglob("*.py"))
MOST_LINES = 400
LONGER: dict[str, str] = {}  # file: reason
BEGINNINGS = ("Of ", "As ", "See ", "Its ")
AMERICAN = (
    r"\b(?:color|behavior|normaliz|initialize[ds]?\b|optimiz(?!ers?:)|summariz|generaliz|center(?:ed|s)?\b|favor)\w*"
)


@functools.cache
def docstrings(path):
    """Returns line and text of every docstring of a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(node, ast.get_docstring(node)) for node in nodes if isinstance(node, documented)]
    return [(getattr(node, "lineno", 1), text) for node, text in found if text]


def name(path):
    return path.relative_to(ROOT).as_posix()


def offences(pattern, *, quoted=r"`[^`]*`|https?://\S+"):
    """Yields the docstrings in which a pattern stands outside code and links."""
    for path in FILES:
        for line, text in docstrings(path):
            if found := re.search(pattern, re.sub(quoted, "", text)):
                yield f"{name(path)}:{line}: {found[0]!r}"


def test_every_module_says_what_it_is():
    silent = [name(p) for p in FILES if p.stat().st_size and not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent, "give these modules a docstring"


def test_no_file_is_too_long():
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES if "src" in path.parts}
    long = {file: n for file, n in lengths.items() if n > MOST_LINES and file not in LONGER}
    assert not long, f"split these files, or list them in LONGER with the reason: more than {MOST_LINES} lines"
    assert all(lengths[file] > MOST_LINES for file in LONGER), (
        "these files are short enough now; take them off the list"
    )


def test_docstrings_begin_with_a_subject():
    found = [f"{name(p)}:{n}: {text.splitlines()[0]}" for p in FILES for n, text in docstrings(p)
             if text.startswith(BEGINNINGS)]  # fmt: skip
    assert not found, f"begin with a subject and a verb, not with {', '.join(BEGINNINGS)}"


def test_numbers_have_their_zero():
    found = list(offences(r"(?<![\w.\])])\.\d+"))
    assert not found, "write 0.016, not .016"


def test_spelling_is_british():
    found = list(offences(AMERICAN))
    assert not found, "write colour, behaviour, normalise, initialise, optimise, optimiser, centre"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("at .016 nats", True), ("at 0.016 nats", False), ("see x.1 and [3].5", False), ("(.5)", True)],
)
def test_a_number_without_its_zero_is_noticed(text, wrong):
    assert bool(re.search(r"(?<![\w.\])])\.\d+", text)) == wrong
