"""Page and goals of stale memory follow from the records; the simulation counts what it says."""

import math
import re

import numpy as np
import pytest
from consolidated import make

from reproduction import goals, stale_goals
from reproduction.pages import stale
from reproduction.pages.renew import renewed
from reproduction.protocols import sequential_test
from reproduction.protocols.sequential_test import by_betting, delays, false_alarms, first_of, least_reads, wilson


def test_page_and_goals_are_made_from_the_records():
    page = stale.PAGE.read_text(encoding="utf-8")
    assert goals.read(stale_goals.TOPIC) == stale_goals.found(), "run python -m reproduction.stale_goals"
    assert renewed(page, stale.sections(), stale.PAGE.name) == page, "run python -m reproduction.pages.stale"


def blocks():
    return re.findall(r"```python\n(.*?)```", stale.PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_guard_of_the_page_reports(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "glass")
    exec(blocks()[1], {})
    assert capsys.readouterr().out.startswith("guard: 60% of far reads skipped; 1 safer steps; alpha 0.01")


@pytest.mark.parametrize("block", [0, 2])
def test_examples_of_the_page_print_what_the_page_says(block, capsys):
    code = blocks()[block]
    exec(code, {})
    said = re.findall(r"#  ?(.*)", code.partition("print(")[2])
    assert capsys.readouterr().out.split() == " ".join(said).split()


def test_the_least_delay_is_a_bound_for_who_knows_time_and_size():
    found = delays(None, 0.05, 0.001, 0.1, 300)
    divergence = 0.1 * math.log(10) + 0.9 * math.log(0.9 / 0.99)
    assert found["least_reads"] == pytest.approx(math.log(19) / divergence, abs=1e-3)
    assert found["reads_interval"][1] > found["least_reads"]
    assert least_reads(0.01, 1.0) == 1.0


def test_streams_without_a_change_are_counted_to_their_end(monkeypatch):
    monkeypatch.setattr(sequential_test, "TOKENS", 50_000)
    late = false_alarms(lambda wrong: np.full(len(wrong), wrong.shape[1] - 1), 0.5, 20, 0)
    assert late["alarms"] == 0
    always = false_alarms(by_betting(0.05), 0.5, 20, 0)
    assert always["share"] == 1.0
    assert always["interval"] == wilson(20, 20)


def test_the_first_alarm_of_each_stream_counts():
    alarms = np.array([[False, True, True], [False, False, False]])
    assert first_of(alarms).tolist() == [1, 3]
