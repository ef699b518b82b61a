import dataclasses
import json

import pytest

from cramlab.auditing import AuditConfig, AuditError, AuditResult, over_training, read_corpus
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import prepare
from cramlab.language_model.training import run_text
from cramlab.records import RecordError
from cramlab.report.audit_page import render_over_training

SIZES = {"vocab_size": 300, "context": 16, "n_layers": 2, "d_model": 16, "n_heads": 2, "batch_size": 8, "n_steps": 8,
         "first_checkpoint": 4, "n_checkpoints": 2, "warmup_steps": 2, "encoding_frac": 0.25,
         "learning_rate": 2e-3}  # fmt: skip
RUNS = ("cram-price0.01-seed0", "gpt2-seed0")
CONFIG = AuditConfig(
    context=16, fit_tokens=400, validation_tokens=100, test_tokens=200, causal_tokens=64, n_bootstrap=50
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints")
    documents = [(d.name, d.text[:2000]) for d in read_corpus("stdlib").documents[:150]]
    text = prepare(documents, out, vocab_size=300, held_out_frac=0.3)
    for model in ("gpt2", "cram"):
        run_text(TextRunConfig(model=model, **SIZES), text, out)
    return out


@pytest.fixture(scope="module")
def audited(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("audits")
    found = over_training.find_checkpoints(trained)
    corpus = read_corpus(str(trained / "held-out.jsonl"))
    return found, corpus, out, over_training.audit_checkpoints(found, corpus, CONFIG, out=out)


def test_checkpoints_are_found_by_run_and_step(trained):
    found = over_training.find_checkpoints(trained)
    assert [(c.run, c.step) for c in found] == [(run, s) for run in RUNS for s in (0, 4, 8)]
    row = json.loads((found[-1].folder / "step.json").read_text())
    assert row["tokens"] == 8 * 8 * 16
    assert 0 <= row["reads_frac"] <= 1


def test_training_learns_and_held_out_text_is_held_out(trained):
    rows = [json.loads(p.read_text()) for p in sorted(trained.glob("gpt2-seed0/*/step.json"))]
    assert rows[-1]["nats_per_token"] < rows[0]["nats_per_token"] - 0.05
    held_out = [json.loads(line) for line in (trained / "held-out.jsonl").read_text().splitlines()]
    assert len(held_out) == 45


def test_runs_are_audited_on_the_same_documents(audited):
    _, _, _, data = audited
    assert [(p["run"], p["step"]) for p in data["points"]][:3] == [(RUNS[0], s) for s in (0, 4, 8)]
    assert [(t["run"], t["from_step"], t["to_step"]) for t in data["trends"]] == [
        (RUNS[0], 4, 8), (RUNS[1], 4, 8),
    ]  # fmt: skip
    for trend in data["trends"]:
        first, last = (p for p in data["points"] if p["run"] == trend["run"] and p["step"] > 0)
        change, low, high = trend["r"]["change"]
        assert change == pytest.approx(last["overall"]["hidden"]["r"][0] - first["overall"]["hidden"]["r"][0], abs=1e-5)
        expected = "rises" if low > 0 else "falls" if high < 0 else "undecided"
        assert trend["r"]["direction"] == expected


def test_there_is_a_trend_from_the_first_checkpoint_and_one_from_a_tenth_of_the_steps(audited):
    found, _, out, _ = audited
    kept = AuditResult.read(out / found[0].run / "audit-00000004.json")
    results = {over_training.Checkpoint("run", step, out): kept for step in (0, 1, 9, 10, 40, 100)}
    results[over_training.Checkpoint("short", 5, out)] = kept
    trends = over_training._trends(results, CONFIG)
    assert [(t["run"], t["from_step"], t["to_step"]) for t in trends] == [("run", 1, 100), ("run", 10, 100)]
    for trend in trends:
        assert trend["r2"] == {"change": pytest.approx([0, 0, 0], abs=1e-12), "direction": "undecided"}


def test_what_is_kept_is_not_made_again(audited, monkeypatch):
    found, corpus, out, data = audited

    def never(*_, **__):
        raise AssertionError("audited again")

    monkeypatch.setattr(over_training, "audit", never)
    again = over_training.audit_checkpoints(found, corpus, CONFIG, out=out)
    assert [p["overall"]["hidden"]["r"][0] for p in again["points"]] == pytest.approx(
        [p["overall"]["hidden"]["r"][0] for p in data["points"]], abs=1e-5
    )


def test_what_is_kept_must_be_what_is_asked_for(audited, trained):
    found, corpus, out, _ = audited
    with pytest.raises(FileExistsError, match=r"another model, text or config \(seed\)"):
        over_training.audit_checkpoints(found, corpus, dataclasses.replace(CONFIG, seed=1), out=out)
    other = dataclasses.replace(corpus, documents=corpus.documents[1:])
    with pytest.raises(FileExistsError, match=r"another model, text or config \(text\)"):
        over_training.audit_checkpoints(found, other, CONFIG, out=out)
    assert sorted(p.name for p in out.rglob("*")) == sorted(
        [*(c.run for c in found[::3]), *(f"audit-{c.step:08d}.json" for c in found)]
    )  # nothing unfinished is left


def test_runs_of_one_name_in_two_folders_stay_apart(trained, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "run" / "step-1").mkdir(parents=True)
        (tmp_path / place / "run" / "step-1" / "config.json").write_text("{}")
    assert [c.run for c in over_training.find_checkpoints(tmp_path)] == ["a/run", "b/run"]
    assert [c.run for c in over_training.find_checkpoints(tmp_path / "a" / "run")] == ["run"]
    assert {c.run for c in over_training.find_checkpoints(trained / RUNS[0])} == {RUNS[0]}


def test_the_document_is_written_read_and_drawn(audited, tmp_path):
    data = audited[3]
    path = tmp_path / over_training.FILE
    over_training.write(path, data)
    assert over_training.read(path) == data
    page = render_over_training(data)
    assert page.count("<svg") == 3
    assert RUNS[0] in page
    path.write_text(json.dumps(data | {"points": []}))
    with pytest.raises(RecordError, match="points"):
        over_training.read(path)


def test_a_folder_without_models_is_refused(tmp_path):
    with pytest.raises(AuditError, match="holds no saved models"):
        over_training.find_checkpoints(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("model", "mamba"), ("first_checkpoint", 0), ("first_checkpoint", 2000)])
def test_impossible_trainings_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} = "):
        TextRunConfig(n_checkpoints=2, **{field: value})
