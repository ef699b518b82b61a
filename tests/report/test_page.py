import copy

import pytest
from pages import Page, in_browser

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


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(found, tmp_path, width):
    shown = in_browser(
        render(found), width, tmp_path,
        """[inside.querySelectorAll("svg").length, inside.querySelector(".results").clientWidth,
        inside.querySelector(".results").scrollWidth]""",
    )  # fmt: skip
    n_figures, table, table_content = shown
    assert n_figures == 2 + 3 * len(found)
    assert table_content <= table <= width


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
