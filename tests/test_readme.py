"""What README and the guides show is run, and the figures are those of the records."""

import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cramlab import records
from cramlab.catalog import MIXERS
from cramlab.cli.main import _parser
from cramlab.config import changed_since, overridden
from cramlab.consolidation.patch import FarReads
from cramlab.consolidation.rules import baselines, learned
from cramlab.experiments.srcd import run_config
from reproduction.pages import readme
from reproduction.pages.renew import renewed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = records.find([ROOT / "results"])
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would; blocks marked `py` need a model that is not there."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))  # where configs look up their annotations
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), names)


def test_readme_is_short_and_its_catalogue_is_whole():
    assert sum(any(map(str.isalpha, word)) for word in README.split()) <= 900
    catalogue = README.partition("## Catalogue")[2].partition("## The tree")[0]
    named = set(re.findall(r"`([A-Za-z-]+)`", catalogue))
    assert named >= MIXERS.keys()
    classes = {**vars(learned), **vars(baselines)}
    own = {name for name, rule in classes.items() if isinstance(rule, type) and issubclass(rule, FarReads)}
    assert {"ConsolidatedAttention", "WindowOnly"} <= own - {"FarReads"} <= named
    tree = README.partition("## The tree")[2].partition("```\n\n")[0]
    rooms = [path.parent.name for path in (ROOT / "src" / "cramlab").glob("*/__init__.py")]
    assert [room for room in rooms if f"\n  {room}/" not in tree] == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run_and_are_short(example, capsys):
    assert len(example.read_text().splitlines()) < 60
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_shell_lines_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shell = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if line.startswith("cramlab")]
    assert len(lines) >= 5
    Path("results").mkdir()
    for line in lines:
        for word in line:
            if ("/" in word and not word.endswith(".html")) or word == "results":
                Path(word).mkdir(parents=True, exist_ok=True)  # what the reader brings
                for name in ("config.json", "checkpoint.pt", "record.json"):
                    (Path(word) / name).touch()
        args = _parser().parse_args(line[1:])
        if line[1] == "run":
            overridden(run_config(mixer="cram", size="small", seed=1), args.overrides)


def test_make_commands_exist_and_ci_runs_the_test_command():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_make_srcd_trains_and_reports(tmp_path):
    """The recipe itself, in the environment that runs the tests."""
    here = [f"BIN={Path(sys.executable).parent}", f"OUT={tmp_path}", "SIZE=tiny"]
    subprocess.run(["make", "-o", ".venv/installed", "srcd", *here], cwd=ROOT, check=True, capture_output=True)
    for mixer in ("cram", "transformer"):
        assert records.read(tmp_path / f"{mixer}-seed0" / "record.json")["status"] == "finished"
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_readmes_tables_and_figures_are_made_from_the_records():
    assert renewed(README, readme.sections(), "README.md") == README
    assert all(f"docs/figures/{name}" in README for name in readme.figures())


def test_every_record_is_valid_and_in_its_place():
    assert RECORDS
    for path in RECORDS:
        record = records.read(path)
        parts = (record["mixer"], record.get("variant"), f"seed{record['seed']}")
        expected = Path(record["experiment"], record["size"], "-".join(part for part in parts if part) + ".json")
        assert path.relative_to(ROOT / "results") == expected


def test_the_first_look_learns():
    """What README says of the size quick: novel retrieval at least 0.95, attention at most 1.5 times the optimum."""
    found = [records.read(path) for path in records.find([ROOT / "results" / "srcd" / "quick"])]
    crams = [record for record in found if record["mixer"] == "cram"]
    assert {record["seed"] for record in crams} == {0, 1, 2}
    for record in crams:
        assert record["metrics"]["test"]["retrieval_acc_novel"] >= 0.95
        assert record["metrics"]["test"]["attention_frac"] <= 1.5 * record["oracle"]["attention_frac"]
        assert not changed_since(record["config"], run_config(mixer="cram", size="quick", seed=record["seed"]))


@pytest.mark.parametrize("size", ["small", "paper"])
def test_the_records_hold_what_readme_says(size):
    """Retrieval as good as full attention's, reads at the optimum, dynamics no worse."""
    found = [records.read(path) for path in records.find([ROOT / "results" / "srcd" / size])]
    assert {(r["size"], r["experiment"]) for r in found} == {(size, "srcd")}
    crams = {r["seed"]: r for r in found if r["mixer"] == "cram"}
    controls = {r["seed"]: r for r in found if r["mixer"] == "transformer"}
    assert crams.keys() == controls.keys() >= ({0, 1, 2} if size == "small" else {0})
    for seed, record in crams.items():
        test, control = record["metrics"]["test"], controls[seed]["metrics"]["test"]
        assert min(test["retrieval_acc_recurring"], test["retrieval_acc_novel"]) >= 0.99
        assert min(control["retrieval_acc_recurring"], control["retrieval_acc_novel"]) >= 0.99
        assert test["attention_frac"] <= 1.2 * record["oracle"]["attention_frac"]
        assert test["reads_frac"] == test["attention_frac"]
        assert 61 <= 1 / test["reads_frac"] <= 69  # "about 1/65 of its reads"
        assert 1.7 < record["n_parameters"] / controls[seed]["n_parameters"] < 1.8  # "three quarters more parameters"
        assert 1.0 < test["dynamics_mse"] / control["dynamics_mse"] < 1.01  # "less than 1% above the control's"
        for run in (record, controls[seed]):
            assert run["cooldown_from_step"] is not None  # ended by its own validation, not by the step limit
            assert not run["revision"].endswith("+")
