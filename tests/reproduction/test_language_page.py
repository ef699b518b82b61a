"""What page and goals of language models say follows from the records; missing records are said to be missing."""

import copy
import json
import re

import pytest

from reproduction import collect_language, goals, language_goals
from reproduction.analysis.language import (
    best_fixed,
    difference,
    familiarity,
    nats,
    pairs,
    practice_curve,
    practice_law,
)
from reproduction.pages import language, language_figure
from reproduction.pages.renew import renewed
from reproduction.protocols.language import BASE, configs

SUMMARY = {"n": 1000, "nats": 2.0, "reads_frac": None, "reads_frac_by_layer": None}


def cells(shares):
    """Rows of two hardness bins for n-grams seen never, 1 to 999 times, and from 1,000 times on."""
    return [
        {"count_from": low, "count_to": high, "nats_from": hard, "nats_to": None, "n": n, "nats": 1.0,
         "reads_frac": share}
        for hard in (0.0, 1.0) for (low, high), (n, share) in zip(((0, 0), (1, 999), (1000, None)), shares[hard],
                                                                   strict=True)
    ]  # fmt: skip


def record(arm, seed=0, loss=2.0, reads=None, validation=None, **changes):
    config = configs(BASE, [arm], [])[0]
    by_layer = None if reads is None else [8 * reads, *[0.0] * 7]
    summary = SUMMARY | {"nats": loss, "reads_frac": reads, "reads_frac_by_layer": by_layer}
    practice = [summary | {"count_from": k, "count_to": 2 * k - 1 if k else 0, "reads_frac": 0.4 / max(k, 1) ** 0.5}
                for k in (0, 1, 2, 4, 8, 16, 1024)]  # fmt: skip
    shares = {0.0: ((100, 0.3), (5, 0.9), (100, 0.1)), 1.0: ((400, 0.5), (5, 0.9), (60, 0.5))}
    row = {"step": 100, "n_tokens": 3_276_800, "nats_per_token": 3.0, "attention_frac": reads or 0.0,
           "attention_frac_by_layer": by_layer}  # fmt: skip
    test = {
        "all": summary, "repeated": summary, "fresh": summary,
        "by_position": [summary | {"first": 1, "last": 511}, summary | {"first": 512, "last": 1023}],
        "by_count": dict.fromkeys(("bigram", "trigram"), practice),
        "by_count_and_nats": dict.fromkeys(("bigram", "trigram"), [] if reads is None else cells(shares)),
        "nats_by_window": [loss],
    }  # fmt: skip
    found = {"n_sequences": 128, "accuracy": 0.25, "nats": 1.0, "reads_frac": reads}
    recall = {"lookup": [found | {"n_pairs": 16}], "copying": [found | {"n_tokens": 64}],
              "needle": [found | {"context": n} for n in (1024, 2048)]}  # fmt: skip
    routed = {"encoding_ended_at": 50} if config.routes else {}
    made = {
        "kind": "text", "config": vars(config) | {"seed": seed}, "text_sha256": "ab", "n_parameters": 33_000_000,
        "series": [row | routed], "elapsed_s": 9.0, "ms_per_step": 45.0, "runs_at_once": 1, "recall": recall,
        "validation_nats": loss if validation is None else validation, "test": test,
        "hardware": {"accelerator": None, "processor": "a processor"},
    }  # fmt: skip
    return copy.deepcopy(made) | changes


def write(root, *records, corpus="code"):
    folder = root / "results" / "language" / corpus
    folder.mkdir(parents=True, exist_ok=True)
    for one in records:
        (folder / f"{one['config']['arm']}-seed{one['config']['seed']}.json").write_text(json.dumps(one))


def search(root, *arms):
    """Short runs of each arm at two learning rates."""
    folder = root / "results" / "language" / "code" / "tuning"
    folder.mkdir()
    for arm in arms:
        for rate in (0.001, 0.002):
            run = record(arm)
            run["config"]["learning_rate"] = rate
            (folder / f"{arm}-{rate}.json").write_text(json.dumps(run))


def goal(root, beginning):
    found = [one for one in language_goals.found(root) if one["goal"].startswith(beginning)]
    assert len(found) == 1
    return found[0]


def test_the_best_fixed_layer_is_chosen_on_validation_text(tmp_path):
    write(tmp_path, record("layer-6", loss=2.0, validation=2.2, reads=0.125),
          record("layer-7", loss=2.1, validation=2.1, reads=0.125),
          record("layers-3-7", loss=1.0, reads=0.25), record("layer-7-bigrams", loss=1.0, reads=0.125))  # fmt: skip
    assert best_fixed(language.read(tmp_path / "results", "code")) == "layer-7"


def test_differences_are_paired_by_seed(tmp_path):
    for seed, (one, two) in enumerate([(2.0, 2.1), (2.4, 2.52), (1.9, 1.98)]):
        write(tmp_path, record("cram-12", seed, one, reads=0.12), record("llama", seed, two))
    write(tmp_path, record("llama", 9, 50.0))
    search(tmp_path, "cram-12", "llama")
    arms = language.read(tmp_path / "results", "code")
    diff = difference(arms, "cram-12", "llama")
    assert diff.mean == pytest.approx(-0.1)
    assert diff.high < -0.04  # the seeds differ by more than the arms
    found = goal(tmp_path, "code: cram-12 minus Llama, nats")
    assert found["reached"] == pytest.approx(-0.1)
    assert found["interval"] == [pytest.approx(diff.low, abs=1e-3), pytest.approx(diff.high, abs=1e-3)]
    assert found["met"]
    assert len(found["record"]) == 6


@pytest.mark.parametrize(("loss", "reads", "met"), [(1.9, 0.12, True), (1.9, 0.127, False), (2.05, 0.12, False)])
def test_a_goal_is_met_by_loss_and_reads(tmp_path, loss, reads, met):
    for seed, more in enumerate((0.0, 0.001)):
        write(tmp_path, record("cram-12", seed, loss + more, reads=reads), record("layer-7", seed, reads=0.125))
    search(tmp_path, "cram-12", "layer-7")
    found = goal(tmp_path, "code: cram-12 minus layer-7")
    assert found["met"] == met
    assert found["reached"] == pytest.approx(loss - 2.0, abs=1e-3)
    assert f"reads {100 * reads:.1f}%" in found["goal"]


def test_one_seed_or_a_rate_that_was_not_searched_meets_no_goal(tmp_path):
    write(tmp_path, record("cram-12", loss=1.9, reads=0.12), record("layer-7", reads=0.125))
    search(tmp_path, "cram-12", "layer-7")
    found = goal(tmp_path, "code: cram-12 minus layer-7")
    assert (found["met"], found["interval"], found["note"]) == (False, None, "one seed, so no interval")
    write(tmp_path, record("cram-12", 1, 1.9, reads=0.12), record("layer-7", 1, reads=0.125))
    assert goal(tmp_path, "code: cram-12 minus layer-7")["met"]
    (tmp_path / "results" / "language" / "code" / "tuning" / "cram-12-0.001.json").unlink()
    found = goal(tmp_path, "code: cram-12 minus layer-7")
    assert (found["met"], found["note"]) == (False, "learning rates not searched: cram-12")


def test_goals_without_records_have_no_figure(tmp_path):
    write(tmp_path, record("cram-12", reads=0.12))
    found = language_goals.found(tmp_path)
    assert all(one["reached"] is None and not one["met"] and one["note"] for one in found)
    assert goal(tmp_path, "code: cram-12 minus Llama, nats")["note"] == "no record of llama"
    path = language_goals.renew(tmp_path)
    assert goals.read("language", path.parent) == found
    assert goals.render("language", path.parent).count("**no**") == len(found)


def test_speed_and_growth_are_read_from_their_benchmarks(tmp_path):
    bench = tmp_path / "results" / "bench"
    bench.mkdir(parents=True)
    hardware = {"accelerator": "a card", "processor": "x"}
    ways = {"cram-12": {"speedup": {"median": 0.6}}}
    (bench / "language-step.json").write_text(json.dumps({"context": 2048, "ways": ways, "hardware": hardware}))
    rows = [{"arm": "cram-12", "context": n, "ms_per_token": {"median": ms}} for n, ms in ((1024, 2.0), (8192, 2.1))]
    (bench / "language-decode.json").write_text(json.dumps({"rows": rows}))
    speed, growth = goal(tmp_path, "training step"), goal(tmp_path, "decoding")
    assert (speed["reached"], speed["met"], speed["record"]) == (0.6, False, ["results/bench/language-step.json"])
    assert (growth["reached"], growth["met"]) == (1.05, True)


def test_goals_on_srcd_compare_runs_of_equal_size_and_seed(tmp_path):
    folder = tmp_path / "results" / "srcd" / "paper"
    folder.mkdir(parents=True)
    for mixer, seed, step, reads in (("cram", 0, 1800, 0.02), ("cram-delta", 0, 600, 0.015), ("cram-delta", 1, 9, 1.0)):
        test = {"retrieval_acc": 0.9995, "attention_frac": reads, "oracle_attention_frac": 0.015}
        (folder / f"{mixer}-seed{seed}.json").write_text(
            json.dumps({"metrics": {"test": test}, "series": [{"step": step}]})
        )
    found = [one for one in language_goals.found(tmp_path) if one["goal"].startswith("SRCD with the delta rule")]
    assert [(one["reached"], one["met"]) for one in found] == [(0.9995, True), (1.0, True), (0.3333, True)]


def test_familiar_tokens_are_compared_at_equal_hardness():
    assert familiarity(record("cram-12", reads=0.1), "trigram") == pytest.approx((100 * -0.2 + 60 * 0.0) / 160)
    assert familiarity(record("llama"), "trigram") is None


def test_the_practice_curve_joins_seeds_and_finds_its_law():
    runs = [record("cram-12", seed, reads=0.1) for seed in range(3)]
    k, share, n = practice_curve(runs, "trigram")
    assert k[0] == 0
    assert k[3] == pytest.approx((4 * 7) ** 0.5)
    assert share[3] == pytest.approx(0.2)
    assert set(n) == {3000}
    law, exponent = practice_law(runs, "trigram")
    assert law in ("power", "weibull")
    assert exponent == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("arm", "reads"), [("cram-12", 0.1), ("cram-12-window", 0.1), ("window", 0.0), ("llama", None),
                                            ("llama-window", None), ("layer-7", 0.125)])  # fmt: skip
def test_pairs_are_those_of_a_loop_over_tokens_and_layers(arm, reads):
    made = record(arm, reads=reads)
    remembering = {"cram-12-window": 3, "window": 3, "llama-window": 8}.get(arm, 0)
    scored = whole = 0.0
    for t in range(1, 1024):  # a token sees t keys, itself included
        far = 8 * (reads if reads is not None else (0.0 if arm == "llama-window" else 1.0))
        scored += far * t + (remembering - far) * min(t, 128) * (remembering > 0)
        whole += 8 * t
    assert pairs(made) == pytest.approx(scored / whole)


def test_the_page_says_what_the_records_say_whichever_way(tmp_path):
    for loss, word in ((1.9, "ahead, one seed"), (2.1, "behind, one seed")):
        write(tmp_path, record("cram-12", loss=loss, reads=0.12), record("layer-7", reads=0.125),
              record("ship", loss=0.1, reads=0.1))  # fmt: skip
        language_goals.renew(tmp_path)
        made = language.sections(tmp_path / "results")
        assert f"`cram-12` minus `layer-7`: {loss - 2:.3f} nats; attention 0.120 and 0.125: **{word}**" in made["code"]
        assert "| cram-12 | trigram | -0.125 | less, one seed | 0.400 | 0.400 | 0.01" in made["code"]
        assert "ship" not in made["code"]
        assert made["english"] == "There are no records of this corpus."
    language_figure.draw(language.read(tmp_path / "results", "code"), "code", tmp_path)
    assert (tmp_path / "language-code.svg").stat().st_size > 10_000


def test_records_of_another_text_are_refused(tmp_path):
    write(tmp_path, record("cram-12", reads=0.1), record("llama", text_sha256="cd"))
    with pytest.raises(ValueError, match="has records of 2 texts"):
        language.read(tmp_path / "results", "code")


def test_collected_records_hold_what_is_read_and_no_more(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "results" / "language" / "code"
    (runs / "tuning").mkdir(parents=True)
    long = record("cram-12", loss=1.23456789, reads=0.1)
    rows = [{"step": step, "nats_per_token": 3.0} for step in (1, 2)]
    tuning = {name: part for name, part in long.items() if name != "test"} | {"series": rows}
    for path, one in (("cram-12-seed0", long), ("llama-seed0", record("llama")), ("tuning/short", tuning)):
        (runs / f"{path}.json").write_text(json.dumps(one))
    assert len(collect_language.collect(runs, out)) == 3
    found = json.loads((out / "cram-12-seed0.json").read_text())
    assert nats(found) == 1.23457
    assert "nats_by_window" not in found["test"]
    assert "reads_frac_by_layer" not in found["test"]["by_position"][0]
    assert found["test"]["all"]["reads_frac_by_layer"] == [0.8, *[0.0] * 7]
    assert "by_count" not in json.loads((out / "llama-seed0.json").read_text())["test"]
    assert json.loads((out / "tuning" / "short.json").read_text())["series"] == rows[1:]
    write(tmp_path, record("layer-7", reads=0.125))
    language_goals.renew(tmp_path)
    assert "cram-12" in language.sections(tmp_path / "results")["code"]


def test_page_and_goals_are_those_of_the_records():
    results = language.RESULTS.parent
    page = language.PAGE.read_text(encoding="utf-8")
    assert renewed(page, language.sections(results), "language.md") == page, (
        "run python -m reproduction.collect_language"
    )
    short = language.RESULTS_PAGE.read_text(encoding="utf-8")
    made = {"language models": language.short_table(language.read(results, "code"))}
    assert renewed(short, made, "results.md") == short, "run python -m reproduction.collect_language"
    assert goals.read("language") == language_goals.found(language.ROOT), "run python -m reproduction.collect_language"
    assert len(page.splitlines()) <= 150
    for name in re.findall(r"\(figures/(.*?)\)", page):
        assert (language.FIGURES / name).exists()
