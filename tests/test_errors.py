import importlib
import re
from pathlib import Path

import pytest

import cramlab
from cramlab.cli import main
from cramlab.errors import CramlabError

ROOT = Path(cramlab.__file__).parent
ERRORS = [
    (".".join(("cramlab", *path.relative_to(ROOT).with_suffix("").parts)), name)
    for path in sorted(ROOT.rglob("*.py"))
    for name in re.findall(r"^class (\w+(?:Error|Exception))\b", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("module", "name"), ERRORS)
def test_every_error_has_the_one_base_and_a_built_in_one(module, name):
    error = getattr(importlib.import_module(module), name)
    assert issubclass(error, CramlabError)
    if name not in ("CramlabError", "UsageError"):
        assert issubclass(error, (ValueError, RuntimeError))


def test_the_search_for_errors_finds_them():
    assert {"CramlabError", "ConfigError", "RecordError", "RunFailedError"} <= {name for _, name in ERRORS}


@pytest.mark.parametrize(
    ("name", "code"), [("ConfigError", 2), ("AuditError", 2), ("RecordError", 1), ("RunFailedError", 1)]
)
def test_the_command_exits_with_the_code_of_the_error(name, code, monkeypatch, capsys):
    (module,) = (module for module, known in ERRORS if known == name)
    error = getattr(importlib.import_module(module), name)

    def fail(_):
        raise error("no luck")

    monkeypatch.setattr(importlib.import_module("cramlab.cli.run"), "_ls", fail)
    assert main(["ls"]) == code
    assert capsys.readouterr().err == "cramlab: no luck\n"
