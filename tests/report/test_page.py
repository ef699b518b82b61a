import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cramlab.experiments import EXPERIMENTS
from cramlab.report.intervals import seed_interval, share_interval
from cramlab.report.page import render
from cramlab.report.tables import COLUMNS, summarise
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
        self.open, self.ids, self.cells, self.heads, self.fetched, self.count = [], set(), [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids.add(attributes.get("id"))
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            (self.cells if tag == "td" else self.heads).append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            (self.cells if self.open[-1] == "td" else self.heads)[-1] += data


def test_the_page_is_whole_and_fetches_nothing(found):
    text = render(found)
    page = Page(text)
    assert {"attention", "retrieval"} <= page.ids
    assert page.count["table"] == 1
    assert all(target.startswith(("#", "data:")) for target in page.fetched)
    assert page.count.get("script", 0) == 0
    assert page.count["svg"] == 2 + 3 * len(found)  # attention, retrieval; raster, forecast and losses of each run
    assert len(page.cells) == len(COLUMNS[COLUMNS.index("seeds") :]) * len(found)
    assert page.heads[: 1 + len(found)] == ["metric", "cram", "transformer"]
    assert found[0]["hardware"]["processor"] in text


def test_many_mixers_share_out_among_tables_of_one_experiment(found):
    bare = copy.deepcopy(found[0]) | {"series": []}  # nothing to draw
    many = [bare | {"mixer": f"mixer-{i}"} for i in range(6)]
    page = Page(render([*many, bare | {"experiment": "other"}]))
    assert page.count["table"] == 3
    assert [head for head in page.heads if head.startswith("mixer-")] == [f"mixer-{i}" for i in range(6)]


@pytest.fixture(scope="module")
def chromium():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return browser or pytest.skip("no Chromium is installed")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(found, chromium, tmp_path, width):
    """An iframe of the given width measures the page, as a headless window cannot be made narrower than 500 pixels."""
    (tmp_path / "page.html").write_text(render(found), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"""<iframe id="page" src="page.html" style="width: {width}px; height: 800px; border: 0"></iframe><script>
        onload = () => {{ const inside = document.getElementById("page").contentDocument;
        const root = inside.documentElement, table = inside.querySelector(".results");
        document.title = ["measured", inside.querySelectorAll("svg").length, root.clientWidth, root.scrollWidth,
        table.clientWidth, table.scrollWidth].join(" "); }};</script>""",
        encoding="utf-8",
    )
    dump = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
         "--window-size=1400,900", f"--user-data-dir={tmp_path}/profile", str(tmp_path / "frame.html")],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    n_figures, page, content, table, table_content = map(int, re.search(r"measured ([\d ]+)", dump)[1].split())
    assert n_figures == 2 + 3 * len(found)
    assert page >= width - 20  # a scroll bar takes the rest
    assert content <= page
    assert table_content <= table <= page


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


def test_many_runs_have_a_figure_for_each_experiment_and_a_label_for_each_mixer(found):
    short = copy.deepcopy(found[0]) | {"samples": []}
    for row in short["series"]:
        del row["loss"]
    runs = [short | {"seed": seed, "experiment": name} for seed in range(8) for name in ("srcd", "bounds")]
    text = render(runs)
    page = Page(text)
    assert page.count["svg"] == 4  # attention and retrieval; short records have neither samples nor losses
    assert ">srcd, size tiny<" in text
    assert ">bounds, size tiny<" in text


def test_progress_sees_every_run_that_is_drawn(found):
    seen = []

    def progress(runs):
        for run in runs:
            seen.append(run["mixer"])
            yield run

    assert render(found, progress) == render(found)
    assert sorted(seen) == sorted(run["mixer"] for run in found)
