"""docs/consolidate.md: its figures are those of the records, its commands are understood, its code runs."""

import re
from pathlib import Path

import pytest
import torch

from cramlab.cli.main import _parser, main
from cramlab.config import overridden
from cramlab.consolidation.config import ConsolidationConfig
from reproduction.pages import consolidate as tables
from reproduction.pages.renew import renewed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "consolidate.md").read_text(encoding="utf-8")


def test_every_table_is_made_from_the_records():
    assert renewed(PAGE, tables.sections(), "consolidate.md") == PAGE  # refuses a record that has no place in the page
    for name in tables.figures():
        assert f"(figures/{name})" in PAGE
        assert (ROOT / "docs" / "figures" / name).exists()


def commands():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL))
    return [line.split() for line in shell.splitlines() if line.startswith("cramlab")]


def test_shell_lines_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(commands()) >= 3
    for line in commands():
        for word in line:
            if "/" in word:
                Path(word).mkdir(parents=True, exist_ok=True)  # what the reader brings
        overridden(ConsolidationConfig(), _parser().parse_args(line[1:]).overrides)


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("glassllm")
    monkeypatch.chdir(tmp_path)
    small = {"fit": 16, "gate": 8, "sensitivity": 4, "validation": 4, "test": 4, "calibration": 30}
    more = [part for name, n in small.items() for part in ("--set", f"{name}_documents={n}")]
    more += ["--set", "local_steps=4", "--set", "end_steps=8", "--set", "learning_contexts=32"]
    assert main([*commands()[0][1:], *more, "--set", "max_rank=16", "--threads", "1"]) == 0
    capsys.readouterr()
    block, own_rule = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(block, "consolidate.md", "exec"), names)
    assert "patch live on 4 attention modules" in capsys.readouterr().out
    exec(compile(own_rule, "consolidate.md", "exec"), names)
    assert 0.4 < float(capsys.readouterr().out.split()[-1]) < 0.6  # every second token
    torch.set_grad_enabled(True)
