"""docs/consolidate.md and its tables: figures are those of the records, commands are understood, code runs."""

import json
import re
from pathlib import Path

import pytest
import torch

import cramlab
from cramlab.cli.main import _parser, main
from cramlab.config import overridden
from cramlab.consolidation.config import ConsolidationConfig
from reproduction.consolidation_goals import TOPIC, goals
from reproduction.goals import read
from reproduction.pages import consolidate as pages
from reproduction.pages import consolidate_summary
from reproduction.pages.renew import renewed

ROOT = Path(__file__).parents[2]
PAGE, TABLES = (path.read_text(encoding="utf-8") for path in (pages.PAGE, pages.TABLES))
GUIDE = (ROOT / "docs" / "guides" / "own-model.md").read_text(encoding="utf-8")


def test_every_table_is_made_from_the_records():
    made = {PAGE: consolidate_summary.sections(pages.RESULTS), TABLES: pages.tables()}
    for page, sections in made.items():  # a record without marks in the page is refused
        assert page.count(": begin -->") == len(sections)
        assert renewed(page, sections, "consolidate.md") == page, "run python -m reproduction.pages.consolidate"
    for name in pages.figures():
        assert f"(../figures/{name})" in TABLES
        assert (ROOT / "docs" / "figures" / name).exists()


def test_goals_are_answered_from_the_records():
    assert read(TOPIC) == json.loads(json.dumps(goals())), "run python -m reproduction.consolidation_goals"
    for goal in read(TOPIC):
        assert goal["reached"] is not None or goal["note"]


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 150


def commands():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE + TABLES, flags=re.DOTALL))
    return [line.split() for line in shell.splitlines() if line.startswith("cramlab")]


def test_shell_lines_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(commands()) >= 3
    for line in commands():
        for word in line:
            if "/" in word:
                Path(word).mkdir(parents=True, exist_ok=True)  # what the reader brings
        overridden(ConsolidationConfig(), getattr(_parser().parse_args(line[1:]), "overrides", []))


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("glassllm")
    monkeypatch.chdir(tmp_path)
    small = {"fit": 16, "gate": 8, "sensitivity": 4, "validation": 4, "test": 4, "calibration": 30}
    more = [part for name, n in small.items() for part in ("--set", f"{name}_documents={n}")]
    more += ["--set", "local_steps=4", "--set", "end_steps=8", "--set", "learning_contexts=32"]
    assert main([*commands()[0][1:], *more, "--set", "max_rank=16", "--threads", "1"]) == 0
    capsys.readouterr()
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (own_rule,) = re.findall(r"```py\n([^`]*decide.*?)```", GUIDE, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(block, "consolidate.md", "exec"), names)
    assert "patch live on 4 attention modules" in capsys.readouterr().out
    names |= {"model": cramlab.load_pretrained("glassllm").model, "tokens": torch.arange(128)[None]}
    exec(compile(own_rule, "own-model.md", "exec"), names)
    assert 0.4 < float(capsys.readouterr().out.split()[-1]) < 0.6  # every second token
    torch.set_grad_enabled(True)
