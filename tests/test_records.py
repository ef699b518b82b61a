import copy
import json

import pytest

from cramlab import records
from cramlab.experiments.srcd import run_config
from cramlab.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train(run_config(mixer="cram", size="tiny", seed=0), out)


REQUIRED = {
    *("schema_version", "experiment", "size", "mixer", "seed", "config", "config_hash", "versions", "hardware"),
    *("series", "metrics", "oracle", "consolidation_ratio", "elapsed_s"),
}
METRICS = {
    *("retrieval_acc", "retrieval_acc_recurring", "retrieval_acc_novel", "dynamics_mse"),
    *("gate_mean_frac", "attention_frac", "reads_frac", "n_queries"),
}


def test_a_record_says_everything(run):
    out, record = run
    held = json.loads((out / "record.json").read_text())
    assert held == records.read(out / "record.json")
    assert set(held) >= REQUIRED
    assert set(held["metrics"]["test"]) >= METRICS
    assert set(held["oracle"]) == {"attention_frac", "dynamics_mse"}
    assert (held["experiment"], held["size"], held["mixer"], held["seed"]) == ("srcd", "tiny", "cram", 0)
    row = held["series"][0]
    assert {"step", "loss", "train_retrieval_acc", "train_reads_frac"} <= set(row)
    assert held["hardware"]["n_threads"] == 1
    assert held["status"] == "finished"
    assert record["metrics"]["test"]["n_queries"] == held["metrics"]["test"]["n_queries"] > 0


def test_another_version_is_refused_clearly(run, tmp_path):
    record = copy.deepcopy(records.read(run[0] / "record.json"))
    record["schema_version"] = 2
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(records.RecordError, match="schema_version 2, this cramlab reads 1"):
        records.read(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.pop("oracle"), "oracle"),
        (lambda r: r["metrics"]["test"].update(attention_frac=1.5), r"metrics\.test\.attention_frac"),
        (lambda r: r["metrics"].update(test=None), r"metrics\.test"),
        (lambda r: r.update(colour="red"), "colour"),
        (lambda r: r.update(config={}), "config"),
        (lambda r: r["config"]["training"].pop("loss"), r"config\.training"),
        (lambda r: r["series"][0].update(step=-1), r"series\.0\.step"),
        (lambda r: r["series"][0].pop("validation"), r"series\.0"),
        (lambda r: r["metrics"]["test"].pop("reads_frac"), r"metrics\.test"),
        (lambda r: r.update(kind="audit"), "kind"),
    ],
)
def test_a_wrong_record_is_refused_with_its_place(run, change, where):
    record = copy.deepcopy(records.read(run[0] / "record.json"))
    change(record)
    with pytest.raises(records.RecordError, match=where):
        records.validate(record, "x")


def test_a_refused_record_leaves_the_old_one(run, tmp_path):
    path = tmp_path / "record.json"
    good = records.read(run[0] / "record.json")
    records.write(path, good)
    with pytest.raises(records.RecordError):
        records.write(path, good | {"seed": "zero"})
    assert records.read(path) == good
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_cut_off_file_is_named(tmp_path):
    (tmp_path / "record.json").write_text('{"schema_version": 1, ')
    with pytest.raises(records.RecordError, match=r"record\.json is not JSON"):
        records.read(tmp_path / "record.json")


def test_find_takes_files_folders_and_says_what_is_missing(run, tmp_path):
    out, _ = run
    assert records.find([out]) == [out / "record.json"]
    assert records.find([out / "record.json"]) == [out / "record.json"]
    with pytest.raises(records.RecordError, match="does not exist"):
        records.find([tmp_path / "nowhere"])
    with pytest.raises(records.RecordError, match="holds no record"):
        records.find([tmp_path])


def test_find_passes_over_documents_of_other_kinds(run, tmp_path):
    record = tmp_path / "cram-seed0.json"
    record.write_bytes((run[0] / "record.json").read_bytes())
    others = {
        "audit": {"kind": "audit"},
        "x/cram-seed1": {"kind": "irregular"},
        "config": json.loads((run[0] / "config.json").read_text()),
        "older": {"weights_sha256": "", "format": 2},
    }
    for name, document in others.items():
        (tmp_path / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    assert records.find([tmp_path]) == [record]
    assert records.find([tmp_path, record]) == [record]
    (tmp_path / "stray.json").write_text("{}")
    with pytest.raises(records.RecordError, match=r'stray\.json has no field "kind"'):
        records.find([tmp_path])


def test_a_record_of_before_the_kind_is_read(run, tmp_path):
    record = records.read(run[0] / "record.json")
    older = {name: value for name, value in record.items() if name != "kind"}
    (tmp_path / "any-name.json").write_text(json.dumps(older))
    assert records.read_all([tmp_path]) == [records.read(tmp_path / "any-name.json")] == [record]
