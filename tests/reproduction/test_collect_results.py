"""Records in results/ are the short form that the collector writes, and every document says what it is."""

import json
from pathlib import Path

import pytest

from cramlab import records
from cramlab.experiments.srcd import run_config
from cramlab.files import write_json
from cramlab.training import train
from reproduction.collect_results import VALIDATION, collect, short

RESULTS = Path(__file__).parents[2] / "results"
DOCUMENTS = sorted(RESULTS.rglob("*.json"))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return train(run_config(mixer="cram", size="tiny", seed=0), tmp_path_factory.mktemp("run"))


def test_every_document_names_its_kind_and_is_laid_out_as_it_is_written(tmp_path):
    for path in DOCUMENTS[:: max(1, len(DOCUMENTS) // 40)]:
        document = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(document["kind"], str), path
        write_json(tmp_path / path.name, document)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path


def test_the_kind_of_older_documents_follows_from_their_fields():
    older = {"run", "config", "model config", "text", "consolidation", "comparison", "retrieval", "decoding", "timing"}
    seen = set()
    for path in DOCUMENTS:
        document = json.loads(path.read_text(encoding="utf-8"))
        said = document.pop("kind")
        if said in older:
            assert records.kind(document) == said, path
            seen.add(said)
    assert seen >= {"run", "consolidation", "comparison", "retrieval", "decoding", "timing"}
    assert records.kind({"parity": [], "rows": []}) == "timings"
    assert records.kind([]) is records.kind({"colour": "red"}) is None


def test_committed_records_are_in_short_form():
    for path in DOCUMENTS[::25]:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["kind"] == "run":
            assert short(document) == document, path


def test_short_form_keeps_what_pages_read(record):
    assert short(record)["samples"] == record["samples"]  # the experiment srcd is kept complete
    other = record | {"experiment": "bounds"}
    made = short(other)
    records.validate(made, "x")
    assert made["samples"] == []
    assert made["practice"] is None
    validated = [row for row in record["series"] if row["validation"] is not None]
    assert [row["step"] for row in made["series"]] == [row["step"] for row in validated]
    for row, full in zip(made["series"], validated, strict=True):
        assert row["validation"] == pytest.approx({name: full["validation"][name] for name in VALIDATION}, rel=1e-5)
    transition = RESULTS / "transition" / "small" / "cram-recurring_frac=0.7-seed0.json"
    assert json.loads(transition.read_text(encoding="utf-8"))["practice"] is not None


def test_tuning_runs_keep_no_series(record):
    tuning = record | {"experiment": "srcd_table", "metrics": record["metrics"] | {"test": None}}
    assert short(tuning)["series"] == []
    assert short(tuning)["practice"] is None


def test_collected_records_are_found_again(record, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    records.write(tmp_path / "runs" / "a" / "record.json", record)
    (written,) = collect(tmp_path / "runs", tmp_path / "results")
    assert written == tmp_path / "results" / "srcd" / "tiny" / "cram-seed0.json"
    assert records.read_all([tmp_path / "results"]) == [short(record)]
