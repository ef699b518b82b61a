"""The campaign of faults: small draws of its generators hold, its frame notices each fault, its page is true."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from faults import (
    bad_calls,
    bad_files,
    bad_models,
    bad_settings,
    bad_tables,
    bad_texts,
    campaign,
    commands,
    equal_layers,
    equal_models,
    equalities,
    goals,
    kinds,
    page,
    promises,
)  # fmt: skip
from faults.apart import apart
from faults.cases import Answer, Case, Fault, FaultFoundError, NotHereError, RefusedError, check_refusal, judge
from faults.equal import same
from faults.kills import Places
from reproduction.goals import read
from reproduction.pages.renew import renewed

DRAWS = {
    bad_settings: 0.004, bad_files: 0.01, bad_models: 0.1, bad_texts: 0.3, bad_tables: 0.1, bad_calls: 0.05,
    equal_layers: 0.1, equal_models: 0.1, promises: 0.004,
}  # fmt: skip


@pytest.mark.parametrize(("module", "share"), DRAWS.items(), ids=[module.__name__ for module in DRAWS])
def test_small_draws_of_the_generators_hold(module, share):
    cases = list(module.cases(1, share))
    found = [judge(dataclasses.replace(case, apart=False), 60) for case in cases]
    assert found
    assert not [f"{verdict.name}: {verdict.fault}: {verdict.message}" for verdict in found if verdict.fault]


def raising(error):
    def check():
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (lambda: None, None),
        (raising(FaultFoundError(Fault.WRONG, "x")), Fault.WRONG),
        (raising(RefusedError("x")), None),
        (raising(NotHereError("x")), None),
        (raising(KeyError("x")), Fault.TRACEBACK),
        (lambda: time.sleep(30), Fault.HANG),
        (lambda: check_refusal(Answer(0, "done", "")), Fault.ACCEPTED),
        (lambda: check_refusal(Answer(2, "", "cramlab: no\nmore")), Fault.UNCLEAR),
        (lambda: check_refusal(Answer(3, "", "cramlab: no")), Fault.UNCLEAR),
        (lambda: check_refusal(Answer(2, "", "cramlab: no"), ["field"]), Fault.UNCLEAR),
        (lambda: check_refusal(Answer(2, "", "cramlab: no"), ["no"]), None),
        (lambda: same(torch.zeros(2), torch.ones(2), 0.5, "x"), Fault.WRONG),
        (lambda: same(torch.zeros(2), torch.full((2,), float("nan")), 0.5, "x"), Fault.WRONG),
    ],
)  # fmt: skip
def test_a_verdict_names_the_fault(check, fault):
    assert judge(Case("test", "name", check), 0.2).fault == fault


def test_a_case_of_its_own_process_may_die_hang_or_change_this_one():
    changed = []
    cases = {
        "dies": (lambda: os.kill(os.getpid(), signal.SIGTERM), Fault.TRACEBACK),
        "changes": (lambda: changed.append(1), None),
        "finds": (raising(FaultFoundError(Fault.LOST, "x")), Fault.LOST),
    }
    for name, (check, fault) in cases.items():
        assert judge(Case("test", name, check, apart=True), 5).fault == fault
    assert not changed
    ended = apart(lambda: time.sleep(30), seconds=0.2)
    assert ended.timed_out
    assert ended.killed


@pytest.mark.parametrize("where", ["half", "before", "after"])
def test_a_process_dies_at_the_write_that_is_asked_for(where, tmp_path):
    from cramlab.files import write_text

    def work():
        with Places(where, 2):
            for name in ("a", "b", "c"):
                write_text(tmp_path / name, "0123456789")
        return True

    assert apart(work, seconds=20).killed
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left.pop("a") == "0123456789"
    (name, text), *more = left.items()
    assert not more
    assert (name == "b") == (where == "after")
    assert text == ("01234" if where == "half" else "0123456789")


def test_a_mixer_that_looks_ahead_or_at_others_is_found(monkeypatch):
    plain = equal_layers.mixer("transformer", 1)

    def leaking(x, *args, **kwargs):
        return plain(x + 1e-3 * x.mean((0, 1)), *args, **kwargs)

    monkeypatch.setattr(equal_layers, "mixer", lambda *_: leaking)
    for check in equal_layers.CHECKS.values():
        with torch.no_grad(), pytest.raises(FaultFoundError):
            check("transformer", 1)


def test_a_rule_that_promises_too_much_is_found(monkeypatch):
    monkeypatch.setattr(promises.Bare, "p_value", lambda self, increases: 0.0)
    with pytest.raises(FaultFoundError, match="broken"):
        promises._setting("bell", 30, 0.1, 5.0, 3.0, "x")


def test_cases_have_names_of_their_own_and_are_many():
    for module, least in ((bad_tables, 150), (bad_texts, 30), (bad_calls, 500), (equalities, 1000), (promises, 200)):
        names = [case.name for case in module.cases(0, 1.0)]
        assert len(set(names)) == len(names) >= least
    assert set(commands.WRITERS) >= {"run", "audit", "consolidate", "consolidate --from", "irregular", "report"}


def test_the_tests_of_every_kind_are_there():
    assert not [file for files in kinds.KINDS.values() for file in files if not (campaign.ROOT / file).exists()]


def test_a_summary_counts_tries_and_says_how_to_repeat_a_failure():
    cases = [
        Case("one", "a", lambda: {"tried": 5}),
        Case("one", "b", raising(FaultFoundError(Fault.HANG, "slow"))),
        Case("two", "c", raising(RefusedError("no"))),
        Case("two", "d", raising(NotHereError("no such disk"))),
    ]
    found = campaign.summary("kills", 7, [judge(case) for case in cases])
    assert found["tests"] == [
        {"test": "one", "tried": 6, "failed": 1, "refused": 0},
        {"test": "two", "tried": 1, "failed": 0, "refused": 1},
    ]
    (failure,) = found["failures"]
    assert failure["replay"] == 'python -m faults kills --seed 7 --only "b"'
    assert [row["case"] for row in found["not_here"]] == ["d"]


def test_goals_are_met_or_missed_by_the_records():
    def record(**more):
        tests = [{"test": "x", "tried": 104}]
        return {"tried": 3000, "failed": 0, "failures": [], "measured": [], "tests": tests} | more

    parts = {name: record() for name in ("kills", "inputs", "equalities", "promises")}
    parts["decisions"] = record(measured=[{"share": 0.995, "decisions": 1000, "alike": 995}])
    speed = {"rows": [{"what": "layer", "ratio": [1.01, 0.99, 1.02]}, {"what": "decode", "ratio": [1.2, 1.1, 1.3]}]}
    found = goals.goals(parts | {"speed": speed})
    assert [goal["goal"] for goal in found if not goal["met"]] == ["speed, decode: time now over time before"]
    parts["inputs"] = record(failed=1, failures=[{"fault": "hang"}], tried=1999)
    parts["kills"] = record(tests=[{"test": "x", "tried": 99}])
    missed = {goal["goal"]: goal["reached"] for goal in goals.goals(parts) if not goal["met"]}
    assert missed == {"no hangs in the whole campaign": 1, "kills of every command that writes": 99,
                      "generated bad inputs": 1999}  # fmt: skip


def test_rates_have_the_interval_of_clopper_and_pearson():
    assert goals.rate(0, 100) == [0.0, 0.03622]
    assert goals.rate(100, 100) == [0.9638, 1.0]
    assert goals.rate(1, 10) == [0.002529, 0.445]


def test_page_and_goals_are_those_of_the_records():
    text = page.PAGE.read_text(encoding="utf-8")
    assert renewed(text, page.tables(), page.PAGE.name) == text
    assert read(goals.TOPIC) == goals.goals(goals.found())
    assert all(Path(campaign.ROOT / name).exists() for goal in goals.goals(goals.found()) for name in goal["record"])
