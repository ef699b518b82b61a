import json

import numpy as np
import pyarrow.parquet
import pytest
import torch

from cramlab.tasks.export import FIELDS, content_hash, export
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


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.npz or \.parquet"):
        export(TINY, tmp_path / "a.csv", seed=0, split="test", n_sequences=1)
    with pytest.raises(ValueError, match="n_sequences"):
        export(TINY, tmp_path / "a.npz", seed=0, split="test", n_sequences=0)
