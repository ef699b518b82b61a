import copy
import dataclasses
from xml.etree import ElementTree

import pytest

from cramlab.experiments.srcd_sweeps import sweep_config
from cramlab.experiments.srcd_table import table_config
from cramlab.report import tables
from cramlab.report.tables import summarise
from cramlab.training import train
from reproduction.pages import srcd_plots as benchmark_plots
from reproduction.pages.srcd_tables import (
    COLUMNS,
    at_budget,
    benchmark_table,
    goals_table,
    last_quarter_spread,
    results_table,
    sweep_table,
    verdict,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    configs = [table_config(mixer, "tiny", seed, 2e-3) for mixer in ("transformer", "memorizer") for seed in (0, 1)]
    configs = [dataclasses.replace(c, training=dataclasses.replace(c.training, test_seq_lens=(128,))) for c in configs]
    return [train(config, tmp_path_factory.mktemp(config.name)) for config in configs]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    configs = [sweep_config("memorizer", "tiny", 0, "recurring_frac", share) for share in (0.0, 1.0)]
    return [train(config, tmp_path_factory.mktemp("sweep")) for config in configs]


def test_the_table_has_a_row_a_mixer_and_the_papers_figures(table):
    lines = benchmark_table(table, budget_tokens=30_000).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    (transformer,) = [line for line in lines if line.startswith("| transformer")]
    assert "| 0.68 | 1.000 | retrieval undecided; attention reproduced |" in transformer  # two short runs
    (memorizer,) = [line for line in lines if line.startswith("| memorizer")]
    assert "not in the paper" in memorizer


def test_goals_say_what_was_missed(table):
    lines = goals_table({"tiny": table}, mixer="memorizer").splitlines()
    assert lines[0] == "|  | goal | tiny (2 seeds) | the paper |"
    found = dict(line.strip("| ").split(" | ", 1) for line in lines[2:])
    (row,) = [row for row in summarise(table) if row.mixer == "memorizer"]
    assert row.novel.mean < 0.999
    assert found["retrieval, novel"] == f">= 0.999 | **{row.novel.mean:.4f}, missed** | 1.00"
    assert found["attention / optimum"] == "<= 1.03 | 0.000 | 1.07"
    assert found["reduction from the encoding phase"] == ">= 64x | - | 37.8x"


@pytest.mark.parametrize(
    ("retrieval", "attention", "words"),
    [
        ((1.0, 1.0), (0.0151, 0.0153), "retrieval reproduced; attention reproduced"),
        ((0.95, 0.951), (0.0151, 0.0153), "retrieval not reproduced; attention reproduced"),
        ((0.99, 0.99), (0.0499, 0.0501), "retrieval reproduced; attention not reproduced"),
        ((1.0, 0.5), (0.0, 0.04), "retrieval undecided; attention undecided"),
        ((1.0,), (0.016,), "retrieval undecided; attention undecided"),
    ],
)
def test_verdicts_take_the_interval_over_seeds(table, retrieval, attention, words):
    group = []
    for accuracy, share in zip(retrieval, attention, strict=True):
        record = copy.deepcopy(table[0]) | {"mixer": "cram"}
        record["metrics"]["test"] |= {"retrieval_acc": accuracy, "attention_frac": share}
        group.append(record)
    assert verdict(group) == words


def test_equal_tokens_are_the_first_validation_after_them(table):
    rows = [row for row in table[0]["series"] if row["validation"] is not None]
    assert at_budget(table[0], rows[1]["n_tokens"]) == rows[1]["validation"]
    assert at_budget(table[0], rows[1]["n_tokens"] - 1) == rows[1]["validation"]
    assert at_budget(table[0], 10**9) == rows[-1]["validation"]


def test_spread_of_the_last_quarter(table):
    assert last_quarter_spread(table[0]) == 1.0
    assert last_quarter_spread(table[2]) is None  # a memorizer never attends


def test_the_sweep_has_a_row_a_point(sweep):
    lines = sweep_table(sweep).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["recurring_frac=0.0", "recurring_frac=1.0"]
    assert lines[3].split(" | ")[4] == "-"  # nothing is novel where all recurs


@pytest.mark.parametrize("name", ["pareto", "attention_by_mixer", "longer_sequences"])
def test_figures_of_the_table_parse(table, name):
    root = ElementTree.fromstring(getattr(benchmark_plots, name)(table))
    text = "".join(root.itertext())
    assert "memorizer" in text
    assert "transformer" in text


def test_figure_of_the_sweep_parses(sweep):
    assert "optimum" in "".join(ElementTree.fromstring(benchmark_plots.recurrence_sweep(sweep)).itertext())


def test_the_table_of_results_has_a_line_a_mixer(table):
    lines = results_table(table).splitlines()
    assert len(lines) == 2 + 2
    assert all(line.count("|") == len(tables.COLUMNS) + 1 for line in lines)
