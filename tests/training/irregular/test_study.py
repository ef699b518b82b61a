"""A document counts as finished only if data, settings and source are those that are asked for now."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cramlab.cli.main import main
from cramlab.files import only_process_in
from cramlab.records import RecordError
from cramlab.tasks.irregular import DataError
from cramlab.training.irregular.documents import FILE, load
from cramlab.training.irregular.fit import FitConfig
from cramlab.training.irregular.study import Study

from .test_fit import planted

SHORT = FitConfig(max_epochs=2, encoding_epochs=1)
LONGER = dataclasses.replace(SHORT, batch_size=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bytes of a document, and the data and folder it was made with."""
    study = Study(planted(60), tmp_path_factory.mktemp("study"), SHORT)
    study.run("recurrence", 0)
    return study.path("recurrence", 0).read_bytes(), study.data


@pytest.fixture
def study(made, tmp_path):
    """A study with one finished document."""
    content, data = made
    study = Study(data, tmp_path / "pbcseq", SHORT)
    study.path("recurrence", 0).parent.mkdir(parents=True)
    study.path("recurrence", 0).write_bytes(content)
    return study


def rewrite(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_finished_document_is_the_one_asked_for(study):
    held = study.held("recurrence", 0)
    assert held is not None
    assert held["asked"]["data_sha256"] == study.data.digest()
    assert held["data"]["n_series"] == {"train": 36, "validation": 12, "test": 12}
    assert held["data"]["cut_off"] == {"visits_kept": 64, "n_series": 0, "n_visits": 0, "n_labels": 0}
    assert study.held("recurrence", 1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": planted(60, seed=1)}, "asked.data_sha256"),
        ({"config": LONGER}, "asked.settings.fit.batch_size"),
    ],
)
def test_documents_of_other_data_or_settings_are_not_taken(study, changes, message):
    with pytest.raises(FileExistsError, match=rf"differs in {message}\); move it away"):
        dataclasses.replace(study, **changes).check(["recurrence"], 1)


def test_a_document_in_a_foreign_folder_is_not_taken(study):
    other = study.path("transformer", 0)
    other.parent.mkdir()
    other.write_bytes(study.path("recurrence", 0).read_bytes())
    with pytest.raises(FileExistsError, match=r"differs in .*model"):
        study.held("transformer", 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: b"\xff" + content,
        lambda content: b"[]",
        lambda content: content.replace(b'"auc": 0.', b'"auc": 1.', 1),
        lambda content: content.replace(b'"version": 1', b'"version": 2'),
        lambda content: content.replace(b'"kind": "irregular"', b'"kind": "other"'),
        lambda content: content.replace(b'"sha256"', b'"sha255"'),
    ],
)
def test_damage_is_named_with_the_way_out(study, damage):
    path = study.path("recurrence", 0)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordError, match=r"irregular.json .*move it away and run again"):
        study.held("recurrence", 0)


def old(document, origin="tables of SHA-256 abc"):
    """A document as it was written before documents had digests."""
    for name in ("asked", "sha256"):
        document.pop(name)
    document["data"] = {n: v for n, v in document["data"].items() if n not in ("notes", "cut_off")}
    document["data"]["origin"] = origin


def test_documents_without_digests_are_compared_by_what_they_say(study):
    path = study.path("recurrence", 0)
    rewrite(path, old)
    named = dataclasses.replace(study.data, origin="tables of SHA-256 abc")
    assert dataclasses.replace(study, data=named).held("recurrence", 0) == load(path)
    with pytest.raises(FileExistsError, match=r"differs in data.origin"):
        dataclasses.replace(study, data=dataclasses.replace(named, origin="tables of SHA-256 def")).held(
            "recurrence", 0
        )
    with pytest.raises(FileExistsError, match=r"differs in config.fit.batch_size"):
        dataclasses.replace(study, data=named, config=LONGER).held("recurrence", 0)
    rewrite(path, lambda document: document["data"].update(origin=study.data.origin))
    with pytest.raises(FileExistsError, match="data_sha256, which the document does not hold"):
        study.held("recurrence", 0)


def test_what_would_stop_a_study_is_found_before_it_begins(study):
    unlabelled = dataclasses.replace(
        study.data, series=tuple(dataclasses.replace(s, labels=np.full_like(s.labels, -1)) for s in study.data.series)
    )
    with pytest.raises(DataError, match="nobody in train has a label"):
        dataclasses.replace(study, data=unlabelled).check(["transformer"], 2)


def test_the_command_writes_keeps_and_refuses(tmp_path, monkeypatch, capsys):
    data = dataclasses.replace(planted(60), notes=("3 people left out: late",))
    monkeypatch.setattr("cramlab.tasks.irregular.load", lambda name, path: data)
    monkeypatch.setattr("cramlab.training.irregular.fit.FitConfig", lambda: SHORT)
    command = ["irregular", "--data", "pbcseq", "--models", "recurrence,gradient-boosting", "--seeds", "1"]
    command += ["--out", str(tmp_path)]
    assert main(command) == 0
    assert "3 people left out: late" in capsys.readouterr().out
    path = tmp_path / "pbcseq" / "recurrence-seed0" / "irregular.json"
    document = json.loads(path.read_text())
    assert document["kind"] == "irregular"
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "recurrence-seed0: AUC" in capsys.readouterr().out
    assert json.loads(path.read_text()) == document
    monkeypatch.setattr("cramlab.tasks.irregular.load", lambda name, path: planted(61))
    assert main([*command, "--resume"]) == 1
    assert "belongs to another request (differs in asked.data_sha256)" in capsys.readouterr().err
    assert main([*command[:-2], "--models", "jamba", "--out", str(tmp_path / "x")]) == 2
    assert "model" in capsys.readouterr().err


def test_long_series_and_one_class_of_test_labels_are_said(tmp_path, monkeypatch, capsys):
    data = planted(60)
    long = dataclasses.replace(
        data.series[0], times=np.arange(70.0), values=np.ones((70, 2)), labels=np.append(np.full(69, -1), 1)
    )
    data = dataclasses.replace(data, series=(long, *data.series[1:]))
    splits = {"train": data.series[:40], "validation": data.series[40:50],
              "test": [s for s in data.series[50:] if s.labels[-1]]}  # fmt: skip
    monkeypatch.setattr("cramlab.tasks.irregular.load", lambda name, path: data)
    monkeypatch.setattr("cramlab.training.irregular.fit.FitConfig", lambda: SHORT)
    monkeypatch.setattr("cramlab.training.irregular.study.split_people", lambda series, seed: splits)
    command = ["irregular", "--data", "pbcseq", "--models", "recurrence", "--seeds", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert (
        "1 series are longer than the 64 visits that models see; their first 6 visits are cut off, with 0 labels"
        in said
    )
    assert f"no AUC: all {len(splits['test'])} labels are 1" in said


def test_the_study_goes_on_after_a_kill_and_never_in_two_processes_at_once(study):
    folder = study.path("transformer", 0).parent
    folder.mkdir()
    (folder / ".irregular.json.999999999.partial").write_text("{")
    with only_process_in(folder), pytest.raises(FileExistsError, match="another process is writing into"):
        study.run("transformer", 0)
    document, kept = study.run("transformer", 0)
    assert not kept
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert study.run("transformer", 0) == (document, True)
