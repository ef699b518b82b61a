"""Page and goals of drift follow from the records; the simulation counts what it says."""

import math
import re

import numpy as np
import pytest
from consolidated import make

from reproduction import drift_goals, goals
from reproduction.analysis.drift_cram import outcome
from reproduction.pages import drift as page
from reproduction.pages.renew import renewed
from reproduction.protocols import known_size, sequential_test
from reproduction.protocols.sequential_test import by_betting, delays, false_alarms, first_of, least_reads, wilson


def test_page_and_goals_are_made_from_the_records():
    text = page.PAGE.read_text(encoding="utf-8")
    assert goals.read(drift_goals.TOPIC) == drift_goals.found(), "run python -m reproduction.drift_goals"
    assert renewed(text, page.sections(), page.PAGE.name) == text, "run python -m reproduction.pages.drift"


def blocks():
    return re.findall(r"```python\n(.*?)```", page.PAGE.read_text(encoding="utf-8"), re.DOTALL)


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


def test_what_happened_in_a_stream_is_read_from_its_blocks():
    blocks = {"changed": [1.0, 0.98, 0.4, 0.995, 1.0, None], "unchanged": [1.0, 1.0, 0.99, 1.0, 1.0, 0.99],
              "attention": [0.02] * 2 + [0.04] + [0.01] * 3, "optimum": [0.01] * 6, "open": [0, 0, 3, 3, 1, 0],
              "reads_of_changed": [0, 0, 50, 300, 400, 400]}  # fmt: skip
    blocks["changed"][-1] = 0.9
    one = outcome({"blocks": blocks, "changed": 3, "change": "abrupt"}, 2)
    assert one.reads == 100
    assert (one.before, one.lowest, one.open) == (0.99, 0.4, 0)
    assert one.lost == pytest.approx(0.005)
    assert (one.attention_before, one.peak) == pytest.approx((2.0, 4.0))
    blocks["changed"], blocks["unchanged"] = [1.0, 1.0, 0.4, 0.5, 0.5, 0.5], [None] * 6
    never = outcome({"blocks": blocks, "changed": 3, "change": "abrupt"}, 2)
    assert never.reads is None
    assert never.lost is None


def test_cusum_has_few_false_alarms_and_is_the_largest_sum_that_ends_now(monkeypatch):
    monkeypatch.setattr(known_size, "TOKENS", 50_000)
    monkeypatch.setattr(sequential_test, "TOKENS", 50_000)
    wrong = (np.random.default_rng(0).random((3, 40)) < 0.2).astype(float)
    up, down = math.log(0.3 / 0.01), math.log(0.7 / 0.99)
    sums = [
        [max(sum(up if x else down for x in row[i : n + 1]) for i in range(n + 1)) for n in range(40)] for row in wrong
    ]
    np.testing.assert_allclose(known_size.cusums(wrong, 0.3), sums)
    high, low = known_size.threshold(0.01, 0.3, 300), known_size.threshold(0.2, 0.3, 300)
    assert high[0] > low[0]
    assert high[1] <= 0.01 < low[1] <= 0.2


def test_the_first_alarm_of_each_stream_counts():
    alarms = np.array([[False, True, True], [False, False, False]])
    assert first_of(alarms).tolist() == [1, 3]
