"""Two processes on the CPU train as one does: the same numbers, decisions, files and ends."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import sys

import pytest
import torch

from cramlab.config import ConfigError, overridden
from cramlab.experiments.srcd import run_config
from cramlab.files import load_checkpoint
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText
from cramlab.language_model.training import _fit_rank, run_text
from cramlab.launch import LostRankError, launch
from cramlab.records import read, read_json
from cramlab.training import RunFailedError, Stage, train
from cramlab.training.loop import _train_rank

STEPS = 20
FORK = multiprocessing.get_context("fork")
SHORT = (
    "training.n_validation_tokens=512", "training.n_test_tokens=512", "training.encoding_target=0",
    f"training.max_steps={STEPS}", "training.eval_every_steps=10", "training.log_every_steps=1", "model.n_layers=2",
    "training.audit_frac=0.3", "training.precision=64-true", "training.warmup_steps=2", "training.price_ramp_steps=5",
    "model.d_model=32", "model.d_mlp=32", "task.seq_len=48",
)  # fmt: skip
MIXERS = {
    "cram": ("model.mixer.episodic.write=salience",),
    "cram-gumbel": (),
    "mixture-of-depths": (),
}
TEXT = TextRunConfig(
    vocab_size=30, context=16, n_layers=2, d_model=16, n_heads=2, batch_size=4, n_steps=STEPS, warmup_steps=2,
    eval_every_steps=5, encoding_frac=0.2, loss_over="targets",
)  # fmt: skip
ARMS = {
    "nats": {"cram": {"gate_learns": "nats", "memory_write": "salience"}, "reads_frac": 0.3},
    "decision": {"cram": {"working": "delta"}},
    "llama": {"model": "llama"},
}


def short(mixer, *overrides):
    config = overridden(run_config(mixer=mixer, size="tiny", seed=0), (*SHORT, *MIXERS[mixer]))
    stages = (Stage(batch_size=4),)
    return overridden(
        dataclasses.replace(config, training=dataclasses.replace(config.training, stages=stages)), overrides
    )


def on_two(config):
    return overridden(config, ["training.devices=2"])


def arm(name, **changes):
    return dataclasses.replace(TEXT, arm=name, **ARMS[name], **changes)


def some_text():
    stream = torch.randint(30, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return PreparedText(None, stream, stream[:300])


@contextlib.contextmanager
def in_64_bits():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class StoppedError(Exception):
    """Stands for whatever ends a process in mid-run."""


def stop_after(step):
    def stop(row):
        if row["step"] > step:
            raise StoppedError

    return stop


def everything(ranks, send, tasks, out):
    """All runs one after another in the same two processes; says which rank opened which files to write."""
    written = []

    def note(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(str(arguments[0]))

    sys.addaudithook(note)
    for name, config in tasks.items():
        try:
            _train_rank(ranks, lambda row: None, config, out / name, resume=True)
        except RunFailedError as error:
            send(("failed", ranks.index, str(error)))
    with in_64_bits():
        for name in ARMS:
            _fit_rank(ranks, lambda line: None, arm(name, devices=2), some_text(), out / "text-2", None)
    send(("written", ranks.index, [path for path in written if path.startswith(str(out))]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of runs, NAME-1 by one process and NAME-2 by two, and what the two said."""
    out, said = tmp_path_factory.mktemp("runs"), []
    tasks = {f"{mixer}-2": on_two(short(mixer)) for mixer in MIXERS}
    tasks["failed"] = on_two(short("cram", "training.learning_rate=1e30", "training.warmup_steps=0"))
    tasks["begun-by-one"] = on_two(short("cram"))
    for name in (*tasks, "text-2"):
        (out / name).mkdir()
    with pytest.raises(StoppedError):
        train(short("cram"), out / "begun-by-one", progress=stop_after(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda _: FORK)  # which imports nothing anew
        launch(everything, {"tasks": tasks, "out": out}, n_ranks=2, name="all", on_message=said.append)
    for mixer in MIXERS:
        train(short(mixer), out / f"{mixer}-1")
    with in_64_bits():
        for name in ARMS:
            run_text(arm(name), some_text(), out / "text-1")
            run_text(arm(name), some_text(), out / "text-2")  # goes on with what the two have trained
            run_text(arm(name, accumulate=2), some_text(), out / "text-parts")
    return out, said


def near(one, two, rel):
    """Whether two figures agree, or both are missing."""
    return one is two is None or one == pytest.approx(two, rel=rel)


def check_same_run(one, two):
    """Losses to rounding, which Fabric does to 32 bits at the outputs, and decisions to the token."""
    assert len(one["series"]) == len(two["series"]) == STEPS
    same = ("step", "n_tokens", "train_reads_frac", "train_retrieval_acc", "phase", "learning_rate")
    for a, b in zip(one["series"], two["series"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-7)
        assert near(a["quality"], b["quality"], 1e-5)
        assert [a[name] for name in same] == [b[name] for name in same]
    assert one["practice"] == two["practice"]
    for split in ("validation", "test"):
        assert one["metrics"][split].keys() == two["metrics"][split].keys()
        for name, value in one["metrics"][split].items():
            assert near(value, two["metrics"][split][name], 1e-5), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_two_processes_train_as_one(runs, mixer):
    """Twenty steps with audits, prices and every term of the loss."""
    out, _ = runs
    one, two = (read(out / f"{mixer}-{n}" / "record.json") for n in (1, 2))
    check_same_run(one, two)
    assert {row["phase"] for row in one["series"]} == {"routed"}


@pytest.mark.parametrize("name", ARMS)
def test_two_processes_or_two_parts_train_a_language_model_as_one(runs, name):
    out, _ = runs
    one, *others = (read_json(out / f"text-{way}" / f"{name}-seed0.json")["series"] for way in ("1", "2", "parts"))
    assert [row["step"] for row in one] == [5, 10, 15, 20]
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a["nats_per_token"] == pytest.approx(b["nats_per_token"], rel=1e-8)
            assert a["attention_frac_by_layer"] == b["attention_frac_by_layer"]
            assert near(a.get("threshold"), b.get("threshold"), 1e-8)
    if name == "nats":
        assert 0 < one[-1]["attention_frac"] < 1


def test_a_run_begun_by_one_process_goes_on_in_two(runs):
    out, _ = runs
    check_same_run(read(out / "cram-1" / "record.json"), read(out / "begun-by-one" / "record.json"))


def test_only_the_first_rank_writes(runs):
    _, said = runs
    written = {rank: paths for kind, rank, paths in said if kind == "written"}
    assert written[1] == []
    assert any("checkpoint" in path for path in written[0])


def test_a_loss_that_is_not_finite_ends_both_with_one_record(runs):
    out, said = runs
    failures = {rank: message for kind, rank, message in said if kind == "failed"}
    assert failures[0] == failures[1]
    record = read(out / "failed" / "record.json")
    assert record["status"] == "failed"
    assert record["failure"]["message"] in failures[0]


def test_a_killed_rank_ends_all_and_one_process_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORK)

    def kill(row):
        if row["step"] == 11:
            (job,) = (child for child in multiprocessing.active_children() if child.name == "rank 1 of 2")
            os.kill(job.pid, signal.SIGKILL)

    with pytest.raises(LostRankError, match=re.escape("cram-seed0: rank 1 of 2 was ended by signal 9")):
        train(on_two(short("cram")), tmp_path / "killed", progress=kill)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "killed" / "record.json").exists()
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["progress"]["step"] == 10
    resumed = train(short("cram"), tmp_path / "killed", resume=True)
    check_same_run(train(short("cram"), tmp_path / "whole"), resumed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.devices=3",), r"training.devices = 3 must divide training.stages\[0\].batch_size = 4; give 2"),
        (("training.devices=0",), "training.devices = 0 must be at least 1"),
        (
            ("training.devices=2", "training.accelerator=auto"),
            'training.devices = 2 needs training.accelerator = "cpu"',
        ),
    ],
)
def test_devices_that_cannot_work_are_refused_before_anything_starts(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(short("cram", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 3}, "devices = 3 times accumulate = 1 must divide batch_size = 4; give batch_size = 6"),
        ({"accumulate": 8}, "devices = 1 times accumulate = 8 must divide batch_size = 4; give batch_size = 8"),
        ({"devices": 2, "loss_over": "reads"}, 'set loss_over="targets"'),
        ({"devices": 2, "device": "cuda:1"}, 'device = "cuda:1" does not suit devices = 2'),
    ],
)
def test_a_language_model_refuses_devices_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TEXT, **changes)
