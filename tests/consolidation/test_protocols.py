"""The scripts behind docs/consolidate.md, one after another at tiny sizes, and the page's tables of what they wrote."""

import functools
import json
import runpy
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from cramlab.cli.main import main
from cramlab.text import packaged
from reproduction.pages.renew import renewed

pytest.importorskip("glassllm")
ROOT = Path(__file__).parents[2]
SIZES = {"context": 128, "window": 16, "fit_documents": 12, "sensitivity_documents": 3, "layers_per_document": 2,
         "gate_documents": 6, "validation_documents": 4, "calibration_documents": 30, "test_documents": 4,
         "tokens_per_document": 64, "adapter_bytes": 100_000, "max_rank": 8, "units": 4, "local_steps": 4,
         "end_steps": 6, "batch_contexts": 2, "learning_contexts": 32}  # fmt: skip
SET = [part for name, value in SIZES.items() for part in ("--set", f"{name}={value}")]
PLACES = {"comparison": 2, "comparison-stdlib-96": 2, "comparison-prose-128": 2}


def script(monkeypatch, path, *argv):
    monkeypatch.setattr(sys, "argv", [path, *map(str, argv)])
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    finally:
        torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """As results/consolidate would be after a whole run."""
    root = tmp_path_factory.mktemp("results")
    out = root / "glassllm"
    text = ("--text", "stdlib")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(packaged, "_stdlib", functools.cache(packaged._stdlib))  # a second each time
        compare = ("reproduction/protocols/compare_consolidation.py", "glassllm", *text, "--out", out, *SET,
                   "--documents", 2,
                   "--router-steps", 2, "--lora-steps", 2)  # fmt: skip
        script(monkeypatch, *compare)
        before = json.loads((out / "comparison.json").read_text())
        script(monkeypatch, *compare, "--contexts", 96, "--other", "prose")
        assert json.loads((out / "comparison.json").read_text()) == before  # rows that are there are kept
        for promise, name in (("0.1", "p10"), ("0.08", "p08")):
            shutil.copytree(out / "state", out / name / "state")
            argv = ["consolidate", "glassllm", *text, "--out", str(out / name), *SET, "--threads", "1", "--resume"]
            assert main([*argv, "--max-loss-increase", promise]) == 0
        script(monkeypatch, "reproduction/protocols/far_retrieval.py", "glassllm", out / "p10", *text, "--context", 128,
               "--prompts", 4, "--out", out / "retrieval-p10.json")  # fmt: skip
        script(monkeypatch, "benchmarks/consolidated_decode.py", "glassllm", out / "p10", *text, "--context", 120,
               "--tokens", 2, "--prompt", 64, "--prompts", 1, "--out", out / "decode-120-p10.json")  # fmt: skip
    return root


@pytest.fixture
def tables(results, monkeypatch):
    from reproduction.pages import consolidate as module

    monkeypatch.setattr(module, "RESULTS", results)
    return module


def test_every_rule_is_measured_in_every_place(results, tables):
    for name, n_documents in PLACES.items():
        data = json.loads((results / "glassllm" / f"{name}.json").read_text())
        assert data["documents"] == len(data["original"]) == n_documents
        rules = {row["rule"] for row in data["rows"]}
        learned = {"closed form", "local", "end"} - {data["gradients"]["chosen"]}
        only_here = {"benefit gate", "gate, no adapters"} | learned
        assert rules == set(tables.RULES) - {data["gradients"]["chosen"]} - (only_here if "-" in name else set())
        for row in data["rows"]:
            assert all(0 < share <= 1 for share in row["skipped_frac"])


def test_a_folder_is_measured_as_what_was_learned_had_been(results, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_stdlib", functools.cache(packaged._stdlib))
    script(monkeypatch, "reproduction/protocols/compare_consolidation.py", "glassllm", "--text", "stdlib", "--from",
           results / "glassllm" / "p10", "--out", tmp_path, "--documents", 2, "--contexts", 96)  # fmt: skip
    for name in ("comparison", "comparison-stdlib-96"):
        ours, theirs = (json.loads((path / f"{name}.json").read_text()) for path in (tmp_path, results / "glassllm"))
        known = {(row["rule"], row["asked"]): row for row in theirs["rows"]}
        assert {row["rule"] for row in ours["rows"]} == {
            "gate", "window", "layers", "heads", "random", "oracle", "dropped", "linear"
        }  # fmt: skip
        for row in ours["rows"]:
            assert row["increase"] == pytest.approx(known[row["rule"], row["asked"]]["increase"], abs=1e-5)


def test_rows_of_another_folder_are_not_kept(results, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_stdlib", functools.cache(packaged._stdlib))
    shutil.copy(results / "glassllm" / "comparison.json", tmp_path / "comparison.json")
    data = json.loads((tmp_path / "comparison.json").read_text())
    data["sensitivity"][0] += 1.0
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="sensitivity"):
        script(monkeypatch, "reproduction/protocols/compare_consolidation.py", "glassllm", "--text", "stdlib", "--from",
               results / "glassllm" / "p10", "--out", tmp_path, "--documents", 2)  # fmt: skip
    assert json.loads((tmp_path / "comparison.json").read_text()) == data


def test_every_record_has_its_section_and_a_page_of_all_marks_is_made(results, tables):
    sections = tables.sections()
    places = ["", " prose-128", " stdlib-96"]
    wanted = {f"glassllm {what}{place}" for what in ("made", "curves") for place in places}
    wanted |= {f"glassllm {name} {what}" for name in ("p08", "p10") for what in ("promise", "calibration")}
    wanted |= {"glassllm retrieval p10", "glassllm decode 120-p10"}
    assert set(sections) == wanted
    page = renewed(
        "".join(f"<!-- {mark}: begin -->\n\nstale\n\n<!-- {mark}: end -->\n" for mark in sections), sections, "page"
    )
    assert "stale" not in page
    assert "nan" not in page
    assert all(f"| {label} |" in sections["glassllm curves"] for rule, label in tables.RULES.items()
               if rule not in chosen(results))  # fmt: skip
    assert "at most 0.08 nats per token with confidence 0.9" in sections["glassllm p08 promise"]
    assert "| needle | kept of the original's |" in sections["glassllm retrieval p10"]
    for way in ("window everywhere, no adapters", "whole heads, no adapters", "sub-layers linear"):
        assert f"| one token after 120 | {way} |" in sections["glassllm decode 120-p10"]
        assert f"| a prompt of 64 | {way} |" in sections["glassllm decode 120-p10"]


def chosen(results):
    return [json.loads((results / "glassllm" / "comparison.json").read_text())["gradients"]["chosen"]]


def test_the_figure_has_a_panel_a_place_and_every_rule(results, tables):
    (drawn,) = tables.figures().values()
    text = "".join(ElementTree.fromstring(drawn).itertext())
    for title in ("stdlib, 128 tokens", "stdlib, 96 tokens", "prose, 128 tokens", "calibrated"):
        assert title in text
    for rule, label in tables.RULES.items():
        assert (label.replace("*", "") in text) == (rule not in chosen(results))


def test_retrieval_says_how_far_back_each_answer_stood(results):
    data = json.loads((results / "glassllm" / "retrieval-p10.json").read_text())
    assert data["distance"].keys() == data["kinds"].keys() == {"needle", "earlier line"}
    for kind, models in data["kinds"].items():
        assert len(data["distance"][kind]) == len(models["original"]["right"]) == data["prompts"] == 4
        assert all(0 < distance < 128 for distance in data["distance"][kind])
    assert 0 < data["skipped_frac"] <= 1


def test_a_step_that_failed_is_run_again_and_one_that_is_done_is_not(tmp_path):
    from reproduction.protocols.consolidated_smollm2 import Step, run

    note = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(sys.argv[2]); "
    fails = "sys.exit(not pathlib.Path(sys.argv[3]).exists())"

    def step(name, code="", after=""):
        return Step(name, ["-c", note + code, str(tmp_path / "order"), name, str(tmp_path / "mended")], after)

    steps = [step("c", after="b"), step("a"), step("b", fails, after="a")]
    assert run(steps, tmp_path, 2) == ["b", "c"]
    (tmp_path / "mended").touch()
    assert run(steps, tmp_path, 2) == []
    assert run(steps, tmp_path, 2) == []
    assert (tmp_path / "order").read_text() == "abbc"


def test_planted_answers_stand_where_the_tool_says():
    import random

    tool = runpy.run_path(str(ROOT / "reproduction" / "protocols" / "far_retrieval.py"))
    filler = list(range(1000, 1600))
    for kind, context in (("needle", 200), ("one_of_eight", 600)):
        prompt, answer, distance = tool[kind](lambda text: [ord(c) for c in text], filler, context, random.Random(0))
        assert len(prompt) + len(answer) == context
        fact = "".join(map(chr, prompt[: len(prompt) - distance]))
        name = "".join(map(chr, prompt)).rpartition(" of ")[2].removesuffix(" is")
        assert fact.endswith(f" of {name} is{''.join(map(chr, answer))}.\n")
    with pytest.raises(SystemExit, match="no room for 8 facts"):
        tool["one_of_eight"](lambda text: [ord(c) for c in text], filler, 200, random.Random(0))
    prompt, answer, distance = tool["earlier_line"](None, filler, 200, random.Random(0))
    assert len(prompt) + len(answer) == 200
    assert prompt[len(prompt) - distance :][: len(answer)] == answer
