"""Page and goals of several devices follow from the records."""

import json

import pytest

from benchmarks import devices
from cramlab.language_model.run import TextRunConfig
from reproduction import goals, scale_goals
from reproduction.pages import scale
from reproduction.pages.renew import renewed


def test_page_and_goals_are_made_from_the_records():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert goals.read(scale_goals.TOPIC) == scale_goals.found(), "run python -m reproduction.scale_goals"
    assert renewed(page, scale.sections(), scale.PAGE.name) == page, "run python -m reproduction.pages.scale"


def line(arm, n, ms):
    config = TextRunConfig(arm=arm, devices=n, batch_size=8 * n, context=4096, loss_over="targets")
    step = {"ms": ms, "computing_ms": 2.0 * ms, "n_parameters": 310_000_000, "peak_gib": 40.0}
    return devices._row(config, [step, step])


@pytest.mark.parametrize(("ms", "ratio", "met"), [(105.0, 1.905, True), (110.0, 1.818, False)])
def test_two_cards_answer_their_goal(tmp_path, ms, ratio, met):
    assert all(one["reached"] is None and not one["met"] for one in scale_goals.found(tmp_path))
    path = tmp_path / scale_goals.CUDA
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": [line("cram-12", 1, 100.0), line("cram-12", 2, ms)]}))
    (goal,) = (one for one in scale_goals.found(tmp_path) if "on two cards over one" in one["goal"])
    assert (goal["reached"], goal["met"], goal["record"]) == (ratio, met, [scale_goals.CUDA])
