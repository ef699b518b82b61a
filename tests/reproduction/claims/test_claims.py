"""Rows follow from records: planted figures get their verdicts, missing records say so, and the page is up to date."""

import copy
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cramlab import records
from cramlab.cli.main import _parser
from reproduction.claims import (
    audit_rows,
    bounds_rows,
    carried_rows,
    drawings,
    irregular_rows,
    practice_rows,
    table_rows,
    transfer_rows,
    transition_rows,
)
from reproduction.claims.evidence import Evidence, commands, over_seeds, standard
from reproduction.claims.findings import Findings
from reproduction.claims.page import claim_rows, figures, hours
from reproduction.claims.verdict import Verdict
from reproduction.pages.renew import renewed

ROOT = Path(__file__).parents[3]
RUN = records.read(ROOT / "results" / "transition" / "small" / "cram-recurring_frac=0.7-seed0.json")


@pytest.fixture(scope="module")
def tool():
    from reproduction.pages import claims

    return claims


def run(experiment="transition", mixer="cram", variant="", seed=0, **test):
    made = copy.deepcopy(RUN) | {"experiment": experiment, "mixer": mixer, "variant": variant, "seed": seed}
    made["metrics"]["test"] |= test
    return made


def irregular(model, auc, seed, attention=None, data="pbcseq"):
    test = {"auc": auc, "auc_low": auc - 0.05, "auc_high": auc + 0.05, "average_precision": auc,
            "attention_frac": attention, "forecast_skill_ratio": None}  # fmt: skip
    return {"kind": "irregular", "data": {"name": data}, "model": model, "seed": seed, "test": test,
            "seconds": 60.0, "n_parameters": None,
            "hardware": RUN["hardware"]}  # fmt: skip


def test_without_records_nothing_is_reproduced_but_what_is_proved():
    rows = claim_rows(Findings.of(Evidence()))
    assert {row.claim for row in rows} == {f"C{i}" for i in range(1, 9)}
    proved = [row for row in rows if row.verdict is Verdict.REPRODUCED]
    assert {row.command for row in proved} == {"pytest tests/reproduction/analysis/test_bounds.py"}
    assert len(proved) == 2
    assert any(row.verdict is Verdict.NOT_RUN for row in rows)
    assert figures(Findings.of(Evidence())).keys() == {"practice.svg"}  # the null and people need no records


def test_every_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "runs" / "results" / "transfer" / "cram-source-seed0"
    source.mkdir(parents=True)
    for name in ("DIR", "FILE", source / "record.json", source / "checkpoint.pt"):  # what the user brings
        (tmp_path / name).touch()
    for row in claim_rows(Findings.of(Evidence(runs=[RUN | {"practice": None}]))):
        for command in row.command.split(" && "):
            words = command.split()
            if words[0] == "cramlab":
                _parser().parse_args(words[1:])
            else:
                assert words[0] == "make" or words[:2] == ["python", "-m"] or (ROOT / words[1]).exists()
                assert words[0] in ("make", "pytest", "python")
                if words[0] == "python":
                    assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists()


def test_seeds_give_an_interval_and_one_run_none():
    one = over_seeds([run(retrieval_acc=0.98)], "retrieval_acc")
    assert (one.mean, one.low, one.high) == (0.98, None, None)
    two = over_seeds([run(retrieval_acc=0.98), run(retrieval_acc=0.96)], "retrieval_acc")
    assert two.mean == pytest.approx(0.97)
    assert two.high == 1.0
    assert over_seeds([run(retrieval_acc=None)], "retrieval_acc") is None


def test_the_table_prefers_the_papers_length():
    def rows(n_long):
        runs = [run("srcd_table", retrieval_acc=0.5, seed=s) for s in range(3)]
        runs += [run("srcd_table", retrieval_acc=1.0, seed=s) | {"size": "paper"} for s in range(n_long)]
        return {row.what: row for row in table_rows.rows(Evidence(runs=runs))}

    assert rows(2)["cram: retrieval, all queries (2,048 tokens)"].verdict is Verdict.REPRODUCED
    assert rows(2)["jamba: attention, by construction (not run)"].verdict is Verdict.NOT_RUN
    # One run tells nothing of how runs differ.
    assert rows(1)["cram: retrieval, all queries (256 tokens)"].verdict is Verdict.NOT_REPRODUCED


@pytest.mark.parametrize(
    ("paper", "values", "verdict"),
    [
        ("recurrence", (1.004, 1.0, 1.008), Verdict.NOT_REPRODUCED),  # no difference is not 5% more
        ("recurrence", (1.052, 1.054, 1.053), Verdict.REPRODUCED),
        ("recurrence", (1.0, 1.1, 1.05), Verdict.UNDECIDED),
        ("recurrence", (1.053,), Verdict.UNDECIDED),
    ],
)
def test_no_tolerance_is_as_large_as_the_effect(paper, values, verdict):
    runs = [run("srcd_table", "transformer", seed=s, dynamics_mse=0.01) for s in range(len(values))]
    runs += [run("srcd_table", paper, seed=s, dynamics_mse=0.01 * value) for s, value in enumerate(values)]
    rows = {row.what: row for row in table_rows.rows(Evidence(runs=runs))}
    assert rows[f"{paper}: dynamics error over the Transformer's"].verdict is verdict


def test_other_tasks_and_other_mixers_are_no_evidence_for_the_papers():
    other = run(seed=1)
    other["config"]["task"]["n_patterns"] = 20
    longer = run(seed=2)
    longer["config"]["task"]["seq_len"] = 2048
    assert [standard(r) for r in (RUN, other, longer)] == [True, False, True]
    alone = transition_rows.rows(transition_rows.courses(Evidence(runs=[RUN])))
    beside = transition_rows.rows(
        transition_rows.courses(Evidence(runs=[RUN, other, run(mixer="price-only"), run(mixer="cram-random")]))
    )
    for row, again in zip(alone, beside, strict=True):
        assert row == again
    assert commands([RUN, longer, run("srcd")]) == (
        "cramlab run srcd/cram --size small --out runs/results/srcd && "
        "cramlab run transition/cram --size small --out runs/results/transition"
    )


def test_a_fall_at_the_end_of_encoding_is_found_and_laid_at_its_door():
    course = transition_rows.course(RUN)
    assert abs(course.whole.step - RUN["encoding_ended_step"]) <= 15
    assert course.whole.fold > 8
    assert course.routed is None
    assert course.quality < 0.6
    rows = {row.what: row for row in transition_rows.rows(transition_rows.courses(Evidence(runs=[RUN])))}
    assert "1 of 1 runs the step is where the encoding phase ends" in rows["the fall is consolidation"].ours


def falling(mixer, seed, until=800, last=0.0155):
    """A sharp fall long after an encoding phase, or none."""
    made = run(mixer=mixer, seed=seed)
    for row in made["series"]:
        if row["validation"]:
            row["validation"]["attention_frac"] = 1.0 if row["step"] < until else last
    return made | {"encoding_ended_step": 50}


@pytest.mark.parametrize(
    ("n", "hits", "verdict"),
    [(6, 6, Verdict.REPRODUCED), (6, 0, Verdict.NOT_REPRODUCED), (6, 4, Verdict.UNDECIDED), (1, 1, Verdict.UNDECIDED)],
)
def test_the_papers_routers_decide_whether_a_transition_is_emergent(n, hits, verdict):
    runs = [falling("cram-paper", seed, until=800 if seed < hits else 1150) for seed in range(n)]
    for made in runs[hits:]:
        for row in made["series"]:
            if row["validation"]:
                row["validation"]["attention_frac"] = 0.05 if row["step"] > 50 else 1.0
    runs += [run(seed=seed) for seed in range(3)]
    found = {row.what: row for row in transition_rows.rows(transition_rows.courses(Evidence(runs=runs)))}
    row = found["the transition is emergent, not set off by a schedule"]
    assert row.verdict is verdict
    assert f"{hits} of {n} runs with an encoding phase" in row.ours
    assert row.ours.endswith("our router: 0 of 3 runs")


def test_who_ends_at_the_share_of_queries_has_consolidated_nothing():
    runs = [falling("cram-gumbel", 0, last=0.05), falling("cram-gumbel", 1, last=0.0155)]
    found = {row.what: row for row in transition_rows.rows(transition_rows.courses(Evidence(runs=runs)))}
    assert "of these 1 end at the share" in found["the transition is emergent, not set off by a schedule"].ours


def test_runs_without_attention_or_with_few_validations_have_no_course():
    still = run()
    for row in still["series"]:
        if row["validation"]:
            row["validation"]["attention_frac"] = 0.0
    assert transition_rows.course(still) is None
    assert transition_rows.course(run() | {"series": RUN["series"][:8]}) is None


def test_a_run_below_theorem_1_is_a_counterexample_only_where_it_may_memorise():
    free = run("bounds", "price-only", attention_frac=0.016, retrieval_acc_recurring=1.0)
    held = run("bounds", "cram", attention_frac=0.05, retrieval_acc_rebound=0.99)
    held["metrics"]["test"]["n_queries_rebound"] = held["metrics"]["test"]["n_queries_recurring"]
    held["config"]["task"]["rebind_frac"] = 1.0
    first, second, *_ = bounds_rows.rows(bounds_rows.points(Evidence(runs=[free, held])))
    assert first.verdict is Verdict.REPRODUCED
    assert second.verdict is Verdict.NOT_REPRODUCED
    assert [p.below for p in bounds_rows.points(Evidence(runs=[free, held]))] == [True, False]
    held["metrics"]["test"]["attention_frac"] = 0.01
    assert bounds_rows.rows(bounds_rows.points(Evidence(runs=[held])))[0].verdict is Verdict.NOT_REPRODUCED


def series(accuracies, attention, reads=1.0):
    """A validation every 100 tokens."""
    return [
        {"step": s, "n_tokens": 100 * s, "train_reads_frac": reads,
         "validation": {"retrieval_acc": accuracy, "attention_frac": share}}
        for s, (accuracy, share) in enumerate(zip(accuracies, attention, strict=True), start=1)
    ]  # fmt: skip


def test_a_reduction_that_costs_accuracy_is_none():
    runs = [
        run("transfer", "cram", "recall-scratch", attention_frac=0.2, retrieval_acc=0.99),
        run("transfer", "cram", "recall-head", attention_frac=0.1, retrieval_acc=0.97),
        run("transfer", "cram", "rebound-scratch", attention_frac=0.2, retrieval_acc=0.99),
        run("transfer", "cram", "rebound-head", attention_frac=0.1, retrieval_acc=0.985),
        run("transfer", "cram", "copy-scratch", attention_frac=0.2, retrieval_acc=0.99, dynamics_mse=0.01),
        run("transfer", "cram", "copy-head", attention_frac=0.1, retrieval_acc=0.99, dynamics_mse=0.02),
        run("transfer", "cram", "source"),
    ]
    found = transfer_rows.on_targets(Evidence(runs=runs))
    saved = {(r.target, r.way): transfer_rows.reduction(found, r) for r in found}
    assert saved["recall", "head"] is saved["copy", "head"] is None
    assert saved["rebound", "head"] == pytest.approx(0.5)
    table = transfer_rows.table(transfer_rows.on_targets(Evidence(runs=runs)), Evidence(runs=runs))
    assert table.count("accuracy lost") == 2
    assert "Sources: cram seed 0" in table
    row = transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=runs)))[0]
    assert row.ours == "recall: none in 1 of 1; rebound: 50%; copy: none in 1 of 1"
    assert row.verdict is Verdict.UNDECIDED  # one run a target
    again = [copy.deepcopy(r) | {"seed": 1} for r in runs]
    assert (
        transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=runs + again)))[0].verdict is Verdict.NOT_REPRODUCED
    )


def test_a_reduction_is_a_mean_over_seeds_none_of_which_lost():
    runs = []
    for seed, share in enumerate((0.05, 0.06, 0.04)):
        runs += [run("transfer", "cram", f"recall-{way}", seed, attention_frac=frac)
                 for way, frac in (("scratch", 0.2), ("head", share))]  # fmt: skip
    row = transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=runs)))[0]
    assert row.ours == "recall: 75 [63, 87]%"
    assert row.verdict is Verdict.REPRODUCED
    runs[-1]["metrics"]["test"]["attention_frac"] = 0.15
    assert (
        transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=runs)))[0].verdict is Verdict.UNDECIDED
    )  # its interval holds the claim
    runs[-1]["metrics"]["test"]["retrieval_acc"] = 0.5
    row = transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=runs)))[0]
    assert row.ours == "recall: none in 1 of 3"
    assert row.verdict is Verdict.NOT_REPRODUCED


def test_controls_that_save_reads_are_reported():
    runs = [
        run("transfer", "cram", "recall-scratch", attention_frac=0.2),
        run("transfer", "cram-random", "recall", attention_frac=0.1),
        run("transfer", "seqboat", "recall-scratch", attention_frac=0.2),
        run("transfer", "seqboat", "recall-head", attention_frac=0.2),
    ]
    again = runs + [copy.deepcopy(r) | {"seed": 1} for r in runs]
    once, twice = (
        {row.what: row.verdict for row in transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=some)))}
        for some in (runs, again)
    )
    random, seqboat = (
        "a random router at the carried one's rate saves nothing",
        ("SeqBoat's router, carried with a new head, saves nothing"),
    )
    assert (once[random], once[seqboat]) == (Verdict.UNDECIDED, Verdict.UNDECIDED)
    assert (twice[random], twice[seqboat]) == (Verdict.NOT_REPRODUCED, Verdict.REPRODUCED)
    assert twice["a frozen router that never learned saves nothing"] is Verdict.NOT_RUN


def test_training_reads_are_counted_up_to_the_goals():
    made = run("transfer", "cram", "recall-scratch")
    made["oracle"]["attention_frac"] = 0.2
    made["series"] = series((0.5, 0.5, 0.5, 0.96, 0.9, 0.97), (1.0, 1.0, 1.0, 0.3, 0.2, 0.24))
    for step, share in zip(made["series"], (1.0, 1.0, 0.1, 0.1, 0.1, 0.1), strict=True):
        step["train_reads_frac"] = share
    row = transfer_rows.row(made)
    assert row.reads_to_goal == pytest.approx(100 + 100 + 10 + 10)
    assert row.reads_to_sparse == pytest.approx(100 + 100 + 40)


def test_training_reads_are_compared_with_the_cheaper_way_from_scratch():
    def with_series(variant, *args, **test):
        return run("transfer", "cram", variant, **test) | {"series": series(*args)}

    sparse = (0.1, 0.1, 0.1, 0.01)
    runs = [
        with_series("patterns-scratch", (0.5, 0.5, 0.5, 0.96), sparse),
        with_series("patterns-no_encoding", (0.5, 0.5, 0.5, 0.96), sparse, 0.5),
        with_series("patterns-all", (0.5, 0.96, 0.96, 0.96), (0.1, 0.1, 0.01, 0.01), 0.1),
    ]
    found = transfer_rows.on_targets(Evidence(runs=runs))
    assert transfer_rows.to_goal(found, found[2]) == pytest.approx(1 - 20 / 200)
    assert transfer_rows.to_sparse(found, found[2]) == pytest.approx(1 - 30 / 200)
    # From scratch never sparse: all that it read is less than it would have needed.
    never = [with_series("patterns-scratch", (0.5, 0.96), (0.1, 0.1)), runs[2]]
    never[0] |= {"train_reads_frac": 1.0, "n_train_tokens": 600}
    found = transfer_rows.on_targets(Evidence(runs=never))
    assert transfer_rows.to_sparse(found, found[1]) == pytest.approx(1 - 30 / 600)
    slow = [runs[0], with_series("patterns-all", (0.5, 0.5), (0.1, 0.1))]
    assert (
        transfer_rows.to_goal(
            transfer_rows.on_targets(Evidence(runs=slow)), transfer_rows.on_targets(Evidence(runs=slow))[1]
        )
        is None
    )


def test_our_aim_needs_three_targets():
    def pair(target, seeds):
        return [run("transfer", "cram", f"{target}-{way}", seed) | {"series": series((0.96,), (0.0155,), reads)}
                for way, reads in (("scratch", 1.0), ("all", 0.3)) for seed in seeds]  # fmt: skip

    def verdict(*targets, seeds=(0, 1)):
        rows = transfer_rows.rows(transfer_rows.on_targets(Evidence(runs=[r for t in targets for r in pair(t, seeds)])))
        return next(row.verdict for row in rows if row.what.startswith("ours: training reads up to 95% retrieval,"))

    assert verdict("recall", "rebound") is Verdict.NOT_REPRODUCED
    assert verdict("recall", "rebound", "laws") is Verdict.REPRODUCED
    assert verdict("recall", "rebound", "laws", seeds=(0,)) is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("scratch", "carried", "auc", "verdict"),
    [
        (0.2, 0.05, 0.80, Verdict.REPRODUCED),
        (0.2, 0.05, 0.77, Verdict.NOT_REPRODUCED),
        (0.2, 0.15, 0.80, Verdict.NOT_REPRODUCED),
        (0.0, 0.0, 0.80, Verdict.NOT_TESTABLE),
        (0.0, 0.1, 0.80, Verdict.NOT_REPRODUCED),
    ],
)
def test_irregular_series_ask_for_fewer_reads_at_equal_auc(scratch, carried, auc, verdict):
    extra = {"train_reads": 10, "train_visits": 100}
    documents = [irregular("cram", 0.80, s, scratch) | {"way": "scratch"} | extra for s in (0, 1)]
    documents += [irregular("cram", auc, s, carried) | {"way": "embedding"} | extra for s in (0, 1)]
    evidence = Evidence(irregular=documents)
    (row,) = carried_rows.rows(carried_rows.groups(evidence))
    assert row.verdict is verdict
    assert "| pbcseq | cram | embedding | 2 |" in carried_rows.table(carried_rows.groups(evidence))
    assert irregular_rows.groups(evidence) == {}


def test_the_best_simple_model_decides_on_irregular_series():
    documents = [irregular("cram", auc, s, 0.1) for s, auc in enumerate((0.80, 0.81, 0.82))]
    documents += [irregular("gradient-boosting", auc, s) for s, auc in enumerate((0.90, 0.91, 0.92))]
    row = irregular_rows.rows(irregular_rows.groups(Evidence(irregular=documents)))[-1]
    assert row.verdict is Verdict.NOT_REPRODUCED
    assert "gradient-boosting 0.910" in row.ours
    worse = [irregular("x", 0.7 + 0.01 * s, s) for s in range(3)]
    assert (
        irregular_rows.rows(irregular_rows.groups(Evidence(irregular=documents[:3] + worse)))[-1].verdict
        is Verdict.REPRODUCED
    )
    assert (
        irregular_rows.rows(irregular_rows.groups(Evidence(irregular=documents[:3] + worse[:1])))[-1].verdict
        is Verdict.UNDECIDED
    )


@pytest.mark.parametrize(
    ("ahead", "verdict"),
    [
        ((0.008, -0.02, 0.04), Verdict.UNDECIDED),  # a lead inside its own noise
        ((0.001, 0.003, 0.002), Verdict.REPRODUCED),
        ((0.02, 0.022, 0.021), Verdict.NOT_REPRODUCED),
        ((0.02,), Verdict.UNDECIDED),
    ],
)
def test_the_interval_of_the_lead_over_splits_decides(ahead, verdict):
    documents = [irregular("cram", 0.8, s, 0.0) for s in range(len(ahead))]
    documents += [irregular("gradient-boosting", 0.8 + lead, s) for s, lead in enumerate(ahead)]
    assert irregular_rows.rows(irregular_rows.groups(Evidence(irregular=documents)))[-1].verdict is verdict


def test_few_reads_are_part_of_the_claim_on_irregular_series():
    def verdict(attention):
        documents = [irregular("cram", 0.8, s, share) for s, share in enumerate(attention)]
        documents += [irregular("transformer", 0.8, s, 1.0) for s in range(2)]
        return irregular_rows.rows(irregular_rows.groups(Evidence(irregular=documents)))[-1].verdict

    assert verdict((0.16, 0.16)) is Verdict.REPRODUCED
    assert verdict((0.18, 0.18)) is Verdict.NOT_REPRODUCED
    assert verdict((0.1, 0.18)) is Verdict.UNDECIDED


def test_the_lead_of_the_trees_is_taken_split_by_split():
    documents = [irregular("cram", auc, s, 0.0) for s, auc in enumerate((0.7, 0.8, 0.9))]
    documents += [irregular("gradient-boosting", auc, s) for s, auc in enumerate((0.72, 0.82, 0.92, 0.1))]
    assert irregular_rows.lead(documents[3:], documents[:3]).format(3) == "0.020 [0.020, 0.020]"
    assert irregular_rows.lead(documents[6:], documents[:3]) is None
    assert "| 0.020 [0.020, 0.020] |" in irregular_rows.table(irregular_rows.groups(Evidence(irregular=documents)))


def test_training_without_attention_models_decides_nothing():
    row = audit_rows.rows(Evidence(over_training={"trends": [], "points": []}))[-1]
    assert (row.claim, row.verdict) == ("C2", Verdict.NOT_RUN)


@pytest.mark.parametrize(
    ("first", "change", "verdict"),
    [
        (30, (-0.7, -0.73, -0.67), Verdict.NOT_TESTABLE),  # before the steps of which the paper speaks
        (10_000, (-0.7, -0.73, -0.67), Verdict.NOT_REPRODUCED),
        (10_000, (0.2, 0.1, 0.3), Verdict.REPRODUCED),
        (10_000, (0.0, -0.1, 0.1), Verdict.UNDECIDED),
    ],
)
def test_training_is_judged_where_the_paper_speaks_of_it(first, change, verdict):
    points = [{"run": "attention-seed0", "step": step, "overall": {"hidden": {"r": [r]}, "mean": {"r": [r / 2]}}}
              for step, r in ((0, 0.1), (first, 0.9), (2 * first, 0.4), (3 * first, 0.2))]  # fmt: skip
    trend = {"run": "attention-seed0", "from_step": first, "to_step": 3 * first, "r": {"change": list(change)}}
    row = audit_rows.rows(Evidence(over_training={"trends": [trend], "points": points}))[-1]
    assert row.verdict is verdict
    assert "0.10 (0.05) at step 0, 0.90 (0.45) at step" in row.ours


def test_dynamics_are_compared_with_the_transformer_of_the_same_seed():
    runs = [run("srcd_table", mixer, seed=s, dynamics_mse=error * (1 + s))
            for mixer, error in (("transformer", 0.01), ("jamba", 0.0078)) for s in (0, 1)]  # fmt: skip
    rows = {row.what: row for row in table_rows.rows(Evidence(runs=runs))}
    row = rows["jamba: dynamics error over the Transformer's"]
    assert row.ours == "0.780 [0.780, 0.780], 2 runs"
    assert row.verdict is Verdict.REPRODUCED
    assert rows["cram: dynamics error over the Transformer's (ours is to be no worse)"].verdict is Verdict.NOT_RUN


def test_a_ratio_of_attention_needs_a_start_that_ended():
    def ours(mixer):
        made = run("srcd_table", mixer) | {"encoding_ended_step": None, "consolidation_ratio": 0.5}
        rows = {row.what: row.ours for row in table_rows.rows(Evidence(runs=[made]))}
        return rows[f"{mixer}: attention at the end over that at the start"]

    assert ours("cram") == "-"
    assert ours("seqboat") == "0.5000, 1 run"  # nothing is decreed there


def test_practice_rows_name_the_command_of_their_own_records(monkeypatch):
    runs = [run("srcd_table", "cram", seed=s) for s in (0, 1)]
    runs += [run("transition", "cram"), *(run(e, "cram-fast-semantic") for e in ("transition", "srcd_table"))]
    monkeypatch.setattr(practice_rows, "N_PATTERNS", 1)
    first, law, _, fast, _ = practice_rows.rows(practice_rows.logs(Evidence(runs=runs)))
    assert first.command == law.command == "cramlab run srcd_table/cram --size small --out runs/results/srcd_table"
    assert ", 2 runs; by other methods: least squares" in first.ours
    assert fast.command == "cramlab run srcd_table/cram-fast-semantic --size small --out runs/results/srcd_table"
    assert ", 1 run; by other methods" in fast.ours
    assert fast.verdict is Verdict.UNDECIDED


def test_the_ceiling_meets_the_floor_where_novel_queries_leave_room():
    """Before n = 109 all that recurs may be read; far on, what is novel is left."""
    assert bounds_rows.ceiling(64) == pytest.approx(0.05 / 0.035)
    assert bounds_rows.ceiling(10**8) == pytest.approx(0.015 / 0.035, rel=0.01)


def test_hours_are_summed_over_runs():
    runs = [run() | {"elapsed_s": 1800.0, "n_train_tokens": 3600} for _ in range(2)]
    text = hours(Evidence(runs=runs))
    assert "| transition | small |" in text
    assert "| 2 | 1.0 | 2 |" in text
    assert "No records" in hours(Evidence())


def test_decreed_encounters_are_counted_from_the_tokens_of_the_encoding_phase():
    tokens = next(r["n_tokens"] for r in RUN["series"] if r["step"] == RUN["encoding_ended_step"])
    expected = tokens * 0.05 * 0.7 / 100
    assert practice_rows.encounters_in_encoding(RUN) == pytest.approx(expected)
    log = RUN["practice"]
    reads = [sum(r[i] for r in log["read"]) / sum(n[i] for n in log["n"]) for i in range(len(log["first_encounter"]))]
    assert all(share == 1 for first, share in zip(log["first_encounter"], reads, strict=True) if first < expected / 2)


DRAWN = {
    "transition": lambda evidence: evidence.of("transition"),
    "bounds": bounds_rows.points,
    "transfer": transfer_rows.on_targets,
    "transfer_training": transfer_rows.on_targets,
    "irregular": irregular_rows.groups,
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_parse(name):
    runs = [RUN, run("transfer", "cram", "recall-scratch"), run("transfer", "cram", "recall-head")]
    evidence = Evidence(runs=runs, irregular=[irregular("cram", 0.8, 0, 0.1)])
    drawn = getattr(drawings, name)(DRAWN[name](evidence))
    assert "".join(ElementTree.fromstring(drawn).itertext())
    assert getattr(drawings, name)(DRAWN[name](Evidence())) is None


def sections_of(text):
    found = {}
    for part in text.split("<!-- ")[1:]:
        mark, _, rest = part.partition(": begin -->")
        if rest:
            found[mark] = rest
    return found


def test_tables_without_fits_are_made_from_the_records(tool):
    """The whole page, whose practice curves take a minute to fit, is compared by the slow test below."""
    evidence = tool.evidence(ROOT / "results")
    text = tool.PAGE.read_text(encoding="utf-8")
    page = sections_of(text) | sections_of(tool.TABLES.read_text(encoding="utf-8"))
    made = {
        "transition": transition_rows.table(transition_rows.courses(evidence)),
        "bounds": bounds_rows.table(bounds_rows.points(evidence)),
        "transfer": transfer_rows.table(transfer_rows.on_targets(evidence), evidence),
        "irregular": irregular_rows.table(irregular_rows.groups(evidence)),
    }
    for name, table in made.items():
        assert table.strip() in page[name], f"{name}: run python -m reproduction.pages.claims results"
    for name in ("transition", "practice", "bounds", "transfer", "transfer_training", "irregular"):
        assert f"(figures/{name}.svg)" in text
        assert (ROOT / "docs" / "figures" / f"{name}.svg").exists()


@pytest.mark.slow
def test_the_page_is_made_from_the_records(tool):
    found = Findings.of(tool.evidence(ROOT / "results"))
    for path, made in ((tool.PAGE, tool.sections(found)), (tool.TABLES, tool.tables(found))):
        text = path.read_text(encoding="utf-8")
        assert renewed(text, made, path.name) == text


def test_documents_of_irregular_series_are_no_run_records(tool, tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "irregular.json").write_text(json.dumps(irregular("cram", 0.8, 3)))
    (tmp_path / "runs" / "y").mkdir()
    carried = irregular("cram", 0.8, 3) | {"way": "all"}
    (tmp_path / "runs" / "y" / "irregular.json").write_text(json.dumps(carried))
    tool.collect_irregular(tmp_path / "runs", tmp_path / "results")
    assert (tmp_path / "results" / "irregular" / "pbcseq" / "cram-all-seed3.json").exists()
    place = tmp_path / "results" / "irregular" / "pbcseq" / "cram-seed3.json"
    assert json.loads(place.read_text())["seed"] == 3
    with pytest.raises(records.RecordError, match="holds no record"):
        records.find([tmp_path / "results"])
