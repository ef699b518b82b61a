"""Answers of a model trained anywhere are scored against exported sequences."""

import json

import numpy as np
import pytest

from cramlab.cli.main import main
from cramlab.errors import UsageError
from cramlab.tasks.export import export
from cramlab.tasks.rebinding import RebindingConfig
from cramlab.tasks.score import score_predictions
from cramlab.tasks.srcd import SRCDConfig

TASK = RebindingConfig(seq_len=40, vocab_size=32)


@pytest.fixture
def data(tmp_path):
    export(TASK, tmp_path / "test.npz", seed=0, split="test", n_sequences=16)
    return tmp_path / "test.npz"


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_line_counts_right_answers_by_slice_and_reads(data, tmp_path, capsys):
    truth = np.load(data)
    asked = truth["answer"] >= 0
    answer = np.where(truth["forgotten"], 17, truth["answer"])
    read = asked | truth["rebound"]
    read[:, 0] = True
    path = save(tmp_path / "mine.npz", answer=answer, read=read, n_train_tokens=np.int64(5000))
    assert main(["score", str(path), "--data", str(data), "--name", "mine", "--out", str(tmp_path / "scores")]) == 0
    found = json.loads((tmp_path / "scores" / "mine.json").read_text())
    metrics = found["metrics"]
    assert metrics["retrieval_acc"] == pytest.approx(1 - truth["forgotten"].sum() / asked.sum())
    assert (metrics["retrieval_acc_forgotten"], metrics["retrieval_acc_rebound"]) == (0.0, 1.0)
    assert metrics["attention_frac"] == pytest.approx(5 / 40)
    assert (metrics["n_train_tokens"], metrics["state_bytes"]) == (5000, None)
    assert found["task"] == "RebindingConfig"
    assert "1.25 x the least reads" in capsys.readouterr().out
    assert main(["score", str(path), "--data", str(data), "--name", "mine", "--out", str(tmp_path / "scores")]) == 2


def test_sequences_of_srcd_have_its_slices(tmp_path):
    export(SRCDConfig(seq_len=64), tmp_path / "srcd.npz", seed=0, split="test", n_sequences=4)
    answer = np.load(tmp_path / "srcd.npz")["answer"]
    path = save(tmp_path / "mine.npz", answer=answer)
    metrics = score_predictions(path, tmp_path / "srcd.npz", name="mine")["metrics"]
    assert metrics["retrieval_acc"] == metrics["retrieval_acc_recurring"] == 1.0
    assert metrics["attention_frac"] is None


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (SRCDConfig(seq_len=64, recurring_frac=1.0), "accuracy 1.0000, 0.2500 of the tokens read, the least is none"),
        (SRCDConfig(seq_len=64, query_frac=0.0), "nothing is asked, 0.2500 of the tokens read, the least is none"),
    ],
)
def test_sequences_in_which_nothing_need_be_read_are_scored(task, said, tmp_path, capsys):
    export(task, tmp_path / "data.npz", seed=0, split="test", n_sequences=4)
    answer = np.load(tmp_path / "data.npz")["answer"]
    read = np.arange(answer.shape[1]) % 4 == 0
    path = save(tmp_path / "mine.npz", answer=answer, read=np.broadcast_to(read, answer.shape))
    files = [str(path), "--data", str(tmp_path / "data.npz")]
    assert main(["score", *files, "--name", "mine", "--out", str(tmp_path / "scores")]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"read": np.ones((16, 40), bool)}, "holds no array answer"),
        ({"answer": np.ones((16, 39), int)}, r"answer is int64 \(16, 39\)"),
        ({"answer": np.ones((16, 40))}, "answer is float64"),
        ({"answer": np.ones((16, 40), int), "read": np.ones((16, 40), int)}, "read is int64"),
        ({"answer": np.ones((16, 40), int), "state_bytes": np.float64(2.5)}, "state_bytes is float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, named, data, tmp_path):
    with pytest.raises(UsageError, match=named):
        score_predictions(save(tmp_path / "bad.npz", **arrays), data, name="bad")


def test_data_that_differ_from_their_datasheet_are_refused(data, tmp_path):
    arrays = dict(np.load(data))
    path = save(tmp_path / "mine.npz", answer=arrays["answer"])
    arrays["answer"] = np.roll(arrays["answer"], 1)
    np.savez_compressed(data, **arrays)
    with pytest.raises(UsageError, match="another content hash"):
        score_predictions(path, data, name="mine")
    (tmp_path / "text.npz").write_text("answer")
    with pytest.raises(UsageError, match=r"is not an \.npz file"):
        score_predictions(path, tmp_path / "text.npz", name="mine")
    (tmp_path / "test.npz.datasheet.json").unlink()
    with pytest.raises(UsageError, match=r"datasheet\.json is missing"):
        score_predictions(path, data, name="mine")
