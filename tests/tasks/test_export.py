import json
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch

from cramlab.tasks.copying import CopyingConfig
from cramlab.tasks.export import FIELDS, content_hash, export
from cramlab.tasks.relabelling import RelabellingConfig
from cramlab.tasks.srcd import TINY, collate, sample


def test_npz_holds_the_very_sequences(tmp_path):
    path = tmp_path / "srcd.npz"
    sheet = export(TINY, path, seed=1, split="test", n_sequences=3)
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files}
    assert set(arrays) == set(FIELDS)
    assert content_hash(arrays) == sheet["sha256"]
    samples = [{name: arrays[name][i] for name in FIELDS} for i in range(3)]
    direct = TINY.dataset(seed=1, split="test", batch_size=3).batch(0)
    assert torch.equal(collate(TINY, samples).continuous, direct.continuous)
    assert json.loads((tmp_path / "srcd.npz.datasheet.json").read_text()) == sheet
    assert sorted(p.name for p in tmp_path.iterdir()) == ["srcd.npz", "srcd.npz.datasheet.json"]


def test_parquet_holds_the_same_content(tmp_path):
    sheet = export(TINY, tmp_path / "a.parquet", seed=1, split="test", n_sequences=2)
    assert sheet["sha256"] == export(TINY, tmp_path / "a.npz", seed=1, split="test", n_sequences=2)["sha256"]
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.num_rows == 2 * TINY.seq_len
    second = sample(TINY, seed=1, split="test", index=1)
    levels = np.array(table["level"])[TINY.seq_len :]
    assert np.array_equal(levels, second["level"])
    assert np.array_equal(np.stack(table["key"].to_pylist())[TINY.seq_len :], second["key"])


def test_hash_changes_with_content(tmp_path):
    first = export(TINY, tmp_path / "a.npz", seed=1, split="test", n_sequences=2)
    second = export(TINY, tmp_path / "b.npz", seed=2, split="test", n_sequences=2)
    assert first["sha256"] != second["sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "a.csv"}, r"\.npz or \.parquet"),
        ({"path": "folder.npz"}, "is a folder; give the name of a file"),
        ({"n_sequences": 0}, "n_sequences = 0 must be at least 1"),
        ({"n_sequences": 1.5}, "n_sequences = 1.5 must be a whole number"),
        ({"seed": -1}, "seed = -1 must be a whole number from 0"),
        ({"seed": True}, "seed = True"),
        ({"split": "dev"}, 'split "dev" is unknown; give one of train, validation, test'),
        ({"config": CopyingConfig(seq_len=64)}, "config is a CopyingConfig; give an SRCDConfig"),
        ({"config": RelabellingConfig(seq_len=64)}, "config is a RelabellingConfig"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(tmp_path, changes, message):
    (tmp_path / "folder.npz").mkdir()
    asked = {"config": TINY, "path": "a.npz", "seed": 0, "split": "test", "n_sequences": 1} | changes
    with pytest.raises(ValueError, match=message):
        export(asked.pop("config"), tmp_path / asked.pop("path"), **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.npz"]


def test_parquet_without_its_package_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("cramlab.tasks.export.sample", None)
    with pytest.raises(ImportError, match=r"install \"cramlab\[parquet\]\""):
        export(TINY, tmp_path / "a.parquet", seed=0, split="test", n_sequences=1)


def test_a_datasheet_never_stands_beside_other_sequences(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    export(TINY, path, seed=0, split="test", n_sequences=1)
    monkeypatch.setattr("cramlab.tasks.export.write_json", lambda path, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(TINY, path, seed=1, split="test", n_sequences=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
