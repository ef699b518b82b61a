"""Goals of serving: no figure without a record of a card, and the fastest original is what counts."""

import json

import pytest

from cramlab.files import write_json
from reproduction import goals, serving_goals

PAGE = serving_goals.PAGE.read_text(encoding="utf-8")


def test_the_goals_of_serving_are_those_that_their_command_writes():
    assert goals.read(serving_goals.TOPIC) == serving_goals.found()
    assert goals.render(serving_goals.TOPIC).strip() in PAGE


@pytest.fixture
def folder(tmp_path):
    """A record of one step, in a folder as deep as the real one."""
    made = tmp_path / "results" / "bench" / "serving"
    made.mkdir(parents=True)
    times = {"original, static cache, SDPA": 6.0, "original, static cache, split-K kernel": 4.0, "gated": 1.6}
    record = {"ways": {name: {"ms": {"median": ms}} for name, ms in times.items()}, "how": "recorded"}
    write_json(made / "step-1b-32768-b8.json", record | {"hardware": {"accelerator": "a card"}})
    return made


def test_a_record_answers_its_goal_against_the_fastest_original(folder):
    found = serving_goals.found(folder)
    assert [goal["reached"] for goal in found if goal["reached"] is not None] == [2.5]
    (answered,) = (goal for goal in found if goal["reached"] is not None)
    assert answered["met"]
    assert answered["record"] == ["results/bench/serving/step-1b-32768-b8.json"]
    assert "32,768 keys, batch 8" in answered["goal"]
    assert not any(goal["met"] for goal in found if goal is not answered)


def test_a_dry_run_and_a_row_that_did_not_fit_answer_nothing(folder):
    path = folder / "step-1b-32768-b8.json"
    record = json.loads(path.read_text())
    for other in (record | {"hardware": {"accelerator": None}}, {"left_out": "wants 200 GB"}):
        write_json(path, other)
        assert all(goal["reached"] is None for goal in serving_goals.found(folder))


def test_a_compiled_step_answers_before_a_recorded_one(folder):
    record = json.loads((folder / "step-1b-32768-b8.json").read_text())
    record["ways"]["gated"]["ms"]["median"] = 2.5
    write_json(folder / "compiled-1b-32768-b8.json", record | {"how": "compiled"})
    assert [goal["reached"] for goal in serving_goals.found(folder) if goal["reached"]] == [1.6]
