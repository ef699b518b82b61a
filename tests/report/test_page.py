import copy
from html.parser import HTMLParser

import pytest

from cramlab.experiments import EXPERIMENTS
from cramlab.report.page import render
from cramlab.report.tables import COLUMNS, markdown_table, seed_interval, share_interval, summarise
from cramlab.training import train


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return [
        train(c, tmp_path_factory.mktemp(c.mixer)) for c in next(EXPERIMENTS["srcd"](size="tiny", seed=0, mixers=None))
    ]


class Page(HTMLParser):
    """Collects tags, ids, table cells and everything that a browser would fetch."""

    VOID = frozenset(("meta", "br", "link", "img", "hr", "input"))

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.cells, self.fetched, self.count = [], set(), [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids.add(attributes.get("id"))
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_the_page_is_whole_and_fetches_nothing(found):
    text = render(found)
    page = Page(text)
    assert {"results", "attention", "retrieval"} <= page.ids
    assert all(target.startswith(("#", "data:")) for target in page.fetched)
    assert page.count.get("script", 0) == 0
    assert page.count["svg"] == 2 + 3 * len(found)  # attention, retrieval; raster, forecast and losses of each run
    assert len(page.cells) == len(COLUMNS) * len(found)
    assert "transformer" in page.cells
    assert found[0]["hardware"]["processor"] in text


def test_the_same_records_give_the_same_page(found):
    assert render(found) == render(list(reversed(found)))


def test_a_failed_run_is_named_and_does_not_hide_the_others(found):
    failed = copy.deepcopy(found[0]) | {"status": "failed", "samples": [], "seed": 9}
    failed["failure"] = {"step": 3, "term": "task", "seed": 9, "message": "loss <term> is not finite"}
    failed["metrics"]["test"] = None
    text = render([failed, *found])
    Page(text)
    assert "loss &lt;term&gt; is not finite" in text
    assert len(summarise([failed, *found])) == 2
    Page(render([failed | {"series": []}]))


def test_rows_average_over_seeds(found):
    second = copy.deepcopy(found[0]) | {"seed": 1}
    second["config"]["seed"] = 1
    second["metrics"]["test"]["attention_frac"] = 0.5
    row = next(r for r in summarise([found[0], second]) if r.mixer == "cram")
    assert row.seeds == (0, 1)
    assert row.attention_frac.mean == pytest.approx((0.5 + found[0]["metrics"]["test"]["attention_frac"]) / 2)
    assert row.attention_frac.low < row.attention_frac.mean < row.attention_frac.high


def test_runs_of_different_configs_are_never_averaged(found):
    other = copy.deepcopy(found[0])
    other["config"]["task"]["rebind_frac"] = 0.05
    rows = summarise([found[0], other, found[0]])
    assert [row.mixer for row in rows] == ["cram, task.rebind_frac=0.0", "cram, task.rebind_frac=0.05"]
    assert [row.seeds for row in rows] == [(0,), (0,)]


def test_dynamics_error_is_shown_against_the_control(found):
    rows = {row.mixer: row for row in summarise(found)}
    assert rows["transformer"].dynamics_ratio == 1.0
    assert rows["cram"].dynamics_ratio == pytest.approx(
        found[0]["metrics"]["test"]["dynamics_mse"] / found[1]["metrics"]["test"]["dynamics_mse"]
    )
    assert summarise(found[:1])[0].dynamics_ratio is None


def test_intervals_by_hand():
    interval = seed_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low) == (2.0, pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4))
    assert seed_interval([1.0]).low is None
    assert seed_interval([1.0]).format(2) == "1.00"
    assert seed_interval([0.9, 1.0]).within(0.0, 1.0).high == 1.0
    wilson = share_interval(1.0, 100)
    assert (wilson.low, wilson.high) == (pytest.approx(0.9630, abs=1e-4), 1.0)
    assert wilson.format(3) == "1.000 [0.963, 1.000]"


def test_markdown_has_a_line_a_mixer(found):
    lines = markdown_table(found).splitlines()
    assert len(lines) == 2 + 2
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
