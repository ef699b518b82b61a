"""A run goes on, or counts as finished, with its own files alone; what is damaged or another's is named."""

import dataclasses
import json
import shutil

import pytest
import torch

from cramlab import records
from cramlab.cli.main import main
from cramlab.config import ConfigError, config_hash, overridden
from cramlab.experiments.srcd import run_config
from cramlab.files import DamagedFileError, load_checkpoint, save_checkpoint
from cramlab.training import train
from cramlab.training.folder import run_hash
from cramlab.training.jobs import run_jobs
from cramlab.training.load import load_run
from cramlab.training.machine import check_model

SHORT = ("training.max_steps=2", "training.n_test_tokens=64", "training.n_validation_tokens=64")
SETTINGS = [part for assignment in SHORT for part in ("--set", assignment)]


def short(seed=0, *overrides):
    return overridden(run_config(mixer="cram", size="tiny", seed=seed), [*SHORT, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        train(short(seed), out / f"cram-seed{seed}")
    return out


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained / "cram-seed0", tmp_path / "cram-seed0")


def told(capsys, *argv):
    """What a command that fails says, in its one line."""
    assert main([str(part) for part in argv]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def resume(folder):
    return ("run", "srcd/cram", "--size", "tiny", "--out", folder.parent, "--resume", *SETTINGS)


def test_a_checkpoint_says_whose_it_is(folder):
    saved = load_checkpoint(folder / "checkpoint.pt")
    assert saved["config_hash"] == run_hash(short()) == run_hash(overridden(short(), ["training.devices=2"]))
    assert records.read(folder / "record.json")["config_hash"] == config_hash(short())
    assert saved["seed"] == 0


def test_a_run_begun_before_a_field_existed_goes_on(trained, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    del config["model"]["mixer"]["router"]["learns"]
    (folder / "config.json").write_text(json.dumps(config))
    saved = load_checkpoint(folder / "checkpoint.pt")
    saved["config_hash"] = config_hash(config)
    save_checkpoint(folder / "checkpoint.pt", saved)
    (folder / "record.json").unlink()
    assert main([str(part) for part in resume(folder)]) == 0
    capsys.readouterr()
    found, whole = (records.read(path / "record.json") for path in (folder, trained / "cram-seed0"))
    assert found["metrics"] == whole["metrics"]
    assert json.loads((folder / "config.json").read_text()) == found["config"] == whole["config"]
    changed = [*resume(folder), "--set", "training.learning_rate=0.5"]
    assert "learning_rate" in told(capsys, *changed)


@pytest.mark.parametrize("name", ["record.json", "checkpoint.pt"])
def test_files_of_another_run_are_refused_by_all(trained, folder, name, capsys):
    shutil.copy(trained / "cram-seed1" / name, folder)
    if name == "checkpoint.pt":
        assert "checkpoint.pt belongs to another run" in told(capsys, "cost", folder)
    assert f"{name} belongs to another run" in told(capsys, "eval", folder)
    if name == "checkpoint.pt":
        (folder / "record.json").unlink()
    assert f"{name} belongs to another run" in told(capsys, *resume(folder))
    assert records.read(folder / "record.json")["status"] == ("finished" if name == "record.json" else "failed")


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "foreign": lambda data: b"<html>404</html>",
    "flipped": lambda data: data[:5000] + bytes([data[5000] ^ 64]) + data[5001:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_by_all(folder, damage, capsys):
    path = folder / "checkpoint.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for command in (("cost", folder), ("eval", folder)):
        assert f"{path} is damaged" in told(capsys, *command)
    (folder / "record.json").unlink()
    assert f"{path} is damaged" in told(capsys, *resume(folder))


def test_a_checkpoint_that_lacks_or_mixes_parts_is_named(folder, capsys):
    path, saved = folder / "checkpoint.pt", load_checkpoint(folder / "checkpoint.pt")
    (folder / "record.json").unlink()
    for change, says in (
        ({"average": None}, "it lacks average"),
        ({"model": {"a": torch.ones(1)}}, "does not fit the run's config"),
        ({"optimizers": []}, "does not fit the run's config"),
        ({"progress": {}}, "does not fit the run's config"),
        ({"practice": {}}, "does not fit the run's config"),
    ):
        save_checkpoint(path, saved | change)
        assert says in told(capsys, *resume(folder)), change
    save_checkpoint(path, {"w": torch.ones(1)})
    assert "is not a checkpoint of a run" in told(capsys, "cost", folder)


def test_a_checkpoint_of_before_the_hash_goes_on(folder, trained):
    saved = load_checkpoint(folder / "checkpoint.pt")
    del saved["config_hash"], saved["seed"]
    save_checkpoint(folder / "checkpoint.pt", saved)
    load_run(folder)
    (folder / "record.json").unlink()
    record = train(short(), folder, resume=True)
    assert record["metrics"] == records.read(trained / "cram-seed0" / "record.json")["metrics"]


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b"[" * 100_000, b'{"schema_version": NaN}', b"", b"[]", b'"\\ud800"'])
def test_json_that_is_none_is_named_by_all(folder, data, capsys, tmp_path):
    (folder / "record.json").write_bytes(data)
    for command in (
        ("eval", folder),
        ("show", folder),
        resume(folder),
        ("report", folder, "--out", tmp_path / "p.html"),
    ):
        assert str(folder / "record.json") in told(capsys, *command)
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: [], "mixer null is unknown"),
        (lambda d: {}, "mixer null is unknown"),
        (lambda d: d | {"mixer": ["cram"]}, r"mixer \[.*\] is unknown"),
        (lambda d: {k: v for k, v in d.items() if k != "task"}, "task is missing"),
        (lambda d: d | {"task": None}, "task = None"),
        (lambda d: d | {"seed": "x"}, "seed = "),
        (lambda d: d | {"model": d["model"] | {"d_model": "x"}}, r"model\.d_model = "),
        (lambda d: d | {"task": d["task"] | {"seq_len": -1}}, r"task\.seq_len = -1"),
        (lambda d: d | {"model": d["model"] | {"d_model": 2**20, "n_layers": 1000}}, "GiB"),
        (lambda d: d | {"model": d["model"] | {"d_model": 127}}, "n_heads"),
    ],
)
def test_a_config_of_wrong_types_is_named_with_its_field(folder, change, says):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=f"config.json: .*{says}"):
        load_run(folder)


@pytest.mark.parametrize("left", ["record.json", "checkpoint.pt"])
def test_a_folder_without_its_config_is_not_overwritten(folder, left, capsys):
    before = (folder / left).read_bytes()
    for name in ("config.json", "record.json", "checkpoint.pt"):
        if name != left:
            (folder / name).unlink()
    fresh = tuple(part for part in resume(folder) if part != "--resume")
    assert "already holds a run" in told(capsys, *fresh)
    assert (folder / left).read_bytes() == before
    train(short(), folder, resume=True)  # its own file says whose it is
    assert {p.name for p in folder.iterdir()} >= {left, "record.json"}


def test_a_checkpoint_that_nothing_vouches_for_is_not_taken(folder):
    saved = load_checkpoint(folder / "checkpoint.pt")
    del saved["config_hash"], saved["seed"]
    save_checkpoint(folder / "checkpoint.pt", saved)
    (folder / "config.json").unlink()
    (folder / "record.json").unlink()
    with pytest.raises(DamagedFileError, match="does not name its run"):
        train(short(), folder, resume=True)


def test_a_folder_that_vanishes_ends_the_run(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="was removed"):
        train(short(), folder, progress=lambda row: shutil.rmtree(folder, ignore_errors=True))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["training.accelerator=mps"], 'training.accelerator = "mps" is not available on this machine'),
        (["training.precision=16-mixed"], "training.precision"),
        (["model.mixer.episodic.n_heads=3"], "n_heads = 3 does not divide"),
        (["model.d_model=1048576"], "GiB"),
        (["task.seq_len=1048576", "task.n_patterns=1048576", "training.n_validation_tokens=64"], "GiB"),
    ],
)
def test_what_this_machine_cannot_train_is_refused_before_there_is_a_folder(tmp_path, assignments, says, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("cramlab.training.machine.memory_bytes", lambda: 2**33)
    with pytest.raises(ConfigError, match=says):
        train(short(0, *assignments), tmp_path / "run")
    with pytest.raises(ConfigError, match=says):
        run_jobs([short(), short(1, *assignments)], tmp_path / "runs", resume=False, n_jobs=1)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_name_are_named(tmp_path):
    with pytest.raises(ConfigError, match="share the folder cram-seed0"):
        run_jobs([short(), short()], tmp_path, resume=False, n_jobs=1)


def test_the_sizes_that_are_run_fit():
    for size in ("tiny", "small", "medium", "paper"):
        check_model(run_config(mixer="cram", size=size, seed=0))
    with pytest.raises(ConfigError, match="tokens a step"):
        check_model(dataclasses.replace(short(), model=dataclasses.replace(short().model, n_layers=1000, d_mlp=2**20)))
