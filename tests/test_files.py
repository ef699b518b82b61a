"""Files are whole or not there, and damaged ones are refused by name."""

import errno
import os
import random
import subprocess
import sys

import pytest
import torch

from cramlab.files import DamagedFileError, load_checkpoint, only_process_in, save_checkpoint, whole, write_json

WEIGHTS = {"model": {"w": torch.arange(3000.0)}}


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", WEIGHTS)
    return tmp_path / "checkpoint.pt"


def test_no_flipped_bit_loads_as_other_weights(checkpoint):
    good, draw, refused = checkpoint.read_bytes(), random.Random(0), 0
    for _ in range(200):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        checkpoint.write_bytes(data)
        try:
            loaded = load_checkpoint(checkpoint)
        except DamagedFileError:
            refused += 1
        else:
            assert torch.equal(loaded["model"]["w"], WEIGHTS["model"]["w"])
    assert refused > 150


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_cut_checkpoint_is_refused_by_name(checkpoint, keep):
    good = checkpoint.read_bytes()
    checkpoint.write_bytes(good[: int(keep * len(good)) if isinstance(keep, float) else keep])
    with pytest.raises(DamagedFileError, match=r"checkpoint\.pt is damaged or not a checkpoint"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("foreign", [b"<html>404</html>", b"\x80\x04N.", b"PK\x05\x06" + bytes(18), b"\x89PNG" * 99])
def test_a_foreign_file_is_refused_by_name(checkpoint, foreign):
    checkpoint.write_bytes(foreign)
    with pytest.raises(DamagedFileError, match=r"checkpoint\.pt is damaged or not a checkpoint \(.*\); .*run again$"):
        load_checkpoint(checkpoint)


def test_what_holds_no_dict_or_code_is_refused(checkpoint):
    torch.save(torch.ones(2), checkpoint)
    with pytest.raises(DamagedFileError, match="holds a Tensor"):
        load_checkpoint(checkpoint)
    torch.save({"run": os.system}, checkpoint)
    with pytest.raises(DamagedFileError, match="damaged or not a checkpoint"):
        load_checkpoint(checkpoint)


def test_what_is_missing_stays_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "checkpoint.pt")


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)")]  # fmt: skip


def fail_half_way(path, failure):
    with whole(path) as partial:
        partial.write_text("half")
        raise failure


@pytest.mark.parametrize("failure", [*FULL, RuntimeError("unexpected pos 64"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(tmp_path, failure):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError if failure in FULL else type(failure)) as raised:
        fail_half_way(path, failure)
    if failure in FULL:
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(path)
    assert path.read_text() == '{"a": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_names_the_file_and_leaves_none(tmp_path):
    """A child, as a limit on the size of files cannot be lifted again."""
    code = (
        "import sys, torch, resource; from pathlib import Path; from cramlab.files import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: save_checkpoint(Path(sys.argv[1]), {'w': torch.zeros(9999)})\n"
        "except OSError as error: print(error)"
    )
    path = tmp_path / "checkpoint.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_partial_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "state").mkdir()
    of_the_dead = [tmp_path / f".checkpoint.pt.{dead.pid}.partial", tmp_path / "state" / f".a.pt.{dead.pid}.partial",
                   tmp_path / f".record.json.{os.getpid()}.partial"]  # fmt: skip
    others = [tmp_path / f".page.html.{os.getppid()}.partial", tmp_path / "notes.partial", tmp_path / ".mine.partial"]
    for path in (*of_the_dead, *others):
        path.write_text("half")
    with only_process_in(tmp_path):
        assert not any(path.exists() for path in of_the_dead)
        assert all(path.exists() for path in others)


def test_a_folder_that_vanishes_is_noticed(tmp_path):
    folder = tmp_path / "run"
    with only_process_in(folder) as still_held:
        still_held()
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match="was removed"):
            still_held()
        folder.mkdir()  # another's now
        with pytest.raises(FileNotFoundError, match="was removed"):
            still_held()
