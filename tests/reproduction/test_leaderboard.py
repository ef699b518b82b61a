"""Leaderboard, its page and its goals follow from the records."""

import json
import shutil

from cramlab import records
from reproduction import goals, leaderboard, leaderboard_goals
from reproduction.pages.renew import renewed


def test_document_page_and_goals_are_those_of_the_records():
    page, made = leaderboard.PAGE.read_text(encoding="utf-8"), leaderboard.document()
    again = "run python -m reproduction.leaderboard"
    assert goals.read(leaderboard_goals.TOPIC) == leaderboard_goals.found(), again
    assert json.loads(json.dumps(made)) == records.read_json(leaderboard.PATH), again
    assert renewed(page, leaderboard.sections(made["lines"]), leaderboard.PAGE.name) == page, again


def test_a_line_has_means_over_seeds_and_a_model_from_elsewhere_has_a_line(tmp_path):
    results = tmp_path / "results"
    source = leaderboard.RESULTS / "srcd_table" / "small"
    for seed in (0, 1):
        to = results / "mqar" / "small" / f"cram-always-seed{seed}.json"
        to.parent.mkdir(parents=True, exist_ok=True)
        record = records.read(source / f"cram-seed{seed}.json")
        record["metrics"]["test"] |= {"retrieval_acc": 0.9 + 0.02 * seed, "reads_frac": 0.5}
        record["oracle"]["attention_frac"] = 0.25
        records.write(to, record | {"experiment": "mqar", "mixer": "cram-always"})
        delta = to.with_name(f"cram-delta-seed{seed}.json")
        record["metrics"]["test"] |= {"reads_frac": 0.2 + 0.01 * seed}
        records.write(delta, record | {"experiment": "mqar", "mixer": "cram-delta"})
    shutil.copytree(leaderboard.RESULTS / "irregular" / "nafld2", results / "irregular" / "nafld2")
    (results / "scores").mkdir()
    metrics = {"retrieval_acc": 0.75, "attention_frac": 0.2, "n_train_tokens": 7, "state_bytes": None}
    score = {"task": "Recall", "name": "mine", "oracle": {"attention_frac": 0.1}, "metrics": metrics}
    (results / "scores" / "mine.json").write_text(json.dumps(score))
    for name, changed in (("nothing-to-read", {}), ("nothing-asked", {"retrieval_acc": None})):
        one = score | {"name": name, "oracle": {"attention_frac": 0.0}, "metrics": metrics | changed}
        (results / "scores" / f"{name}.json").write_text(json.dumps(one))
    lines = {(line["task"], line["mixer"]): line for line in leaderboard.found(results)}
    assert lines["Recall, exported", "nothing-to-read"]["reads_over_optimum"] is None
    assert ("Recall, exported", "nothing-asked") not in lines
    line = lines["mqar, small", "cram-always"]
    assert (line["accuracy"], line["n_seeds"], line["reads_over_optimum"]) == (0.91, 2, 2.0)
    assert line["interval"][0] < 0.9 < 0.92 < line["interval"][1]
    assert line["tokens_to_reach"] > 0
    # Leaky integrators of 64 numbers, and a buffer of 256 entries: keys, values, times, which are filled; a count.
    assert line["state_bytes"] == 4 * 64 + 256 * (2 * 128 * 4 + 5) + 8
    mine = lines["Recall, exported", "mine"]
    assert (mine["reads_over_optimum"], mine["tokens_to_reach"], mine["state_bytes"]) == (2.0, 7, None)
    goal = leaderboard_goals.found(results)[0]
    assert (goal["reached"], goal["met"], len(goal["record"])) == (0.82, True, 4)
