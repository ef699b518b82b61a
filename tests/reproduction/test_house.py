"""The goals of the house follow from its record, and its page shows them."""

import copy
import json

from reproduction import goals, house


def test_goals_and_page_are_made_from_the_record():
    record = json.loads(house.RECORD.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(house.answered(record))) == goals.read("house")
    assert goals.render("house") in house.PAGE.read_text(encoding="utf-8")


def test_a_figure_past_its_target_misses_the_goal():
    record = json.loads(house.RECORD.read_text(encoding="utf-8"))
    slower = copy.deepcopy(record)
    slower["report"]["wall_s"] = 20.5
    slower["equality"]["equal"]["cram-seed3"] = False
    met = {goal["goal"]: goal["met"] for goal in house.answered(slower)}
    assert not met["cramlab report results, seconds on two cores"]
    assert not met[f"runs under a fixed seed with the numbers of {record['equality']['revision']}"]


def test_circles_are_found(tmp_path, monkeypatch):
    for name, text in {"a": "from p import b", "b": "from p.c import x", "c": "import p.a", "d": "import p.a"}.items():
        (tmp_path / "src" / "p").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "p" / f"{name}.py").write_text(text)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.circles() == [["p.a", "p.b", "p.c"]]
