"""The benchmarks run, and refuse what they must; nothing here is about how fast anything is."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator

    yield accelerator
    for name in ("accelerator", "rows", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_holds_and_notices_when_it_does_not(accelerator, dtype, monkeypatch):
    where = accelerator.rows.Where(torch.device("cpu"), dtype)
    assert accelerator.parity(where, 40)["holds"]
    read = accelerator.rows.EpisodicMemory.read
    monkeypatch.setattr(
        accelerator.rows.EpisodicMemory,
        "read",
        lambda self, h, reads, written: read(self, h, reads, written) * (1.0 if reads is None else 1.1),
    )
    assert not accelerator.parity(where, 40)["holds"]


def test_every_measurement_is_made_once_and_kept(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "compiled", lambda *_: {"ways": {}})  # takes half a minute to compile
    monkeypatch.setattr(accelerator, "SHARES", (0.1, 1.0))
    monkeypatch.setattr(accelerator.rows, "repeats_at", lambda *_: 1)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--longest", "32", "--out", str(tmp_path)])
    monkeypatch.setattr(accelerator.rows.decode, "__defaults__", (1, 1, accelerator.rows.CPU))
    assert accelerator.main() == 0
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"ceilings.json", "decode-32.json", "parity-bfloat16.json", "scores-32-0.1.json"} <= set(made)
    assert accelerator.main() == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    (tmp_path / "tier-32.json").unlink()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert accelerator.main() == 3
    assert not (tmp_path / "tier-32.json").exists()


@pytest.fixture
def execution(accelerator, monkeypatch, tmp_path):
    import execution

    monkeypatch.setattr(execution.rows, "repeats_at", lambda *_: 1)
    monkeypatch.setattr(execution, "LENGTHS", [32, 64])
    monkeypatch.setattr(execution, "parity", lambda *_: {"differences": {}, "holds": True})
    monkeypatch.setattr(sys, "argv", ["execution.py", "tier", "scan", "--out", str(tmp_path / "found.json")])
    yield execution
    sys.modules.pop("execution", None)


def test_a_run_that_was_cut_off_goes_on_where_it_was(execution, tmp_path, monkeypatch):
    made, tier = [], execution.ROWS["tier"]

    def cut(n):
        made.append(n)
        if made == [32, 64]:
            raise KeyboardInterrupt
        return tier(n)

    monkeypatch.setitem(execution.ROWS, "tier", cut)
    with pytest.raises(KeyboardInterrupt):
        execution.main()
    assert execution.main() == 0
    assert made == [32, 64, 64]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["row"], row["n_tokens"]) for row in found["rows"]] == [
        ("tier", 32), ("tier", 64), ("scan", 32), ("scan", 64)
    ]  # fmt: skip
    execution.main()  # a finished one is made anew
    assert made == [32, 64, 64, 32, 64]


def test_nothing_is_timed_out_of_time_or_without_parity(execution, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert execution.main() == 3
    monkeypatch.setattr(execution, "parity", lambda *_: {"differences": {"a": 1.0}, "holds": False})
    assert execution.main() == 1
    assert not (tmp_path / "found.json").exists()
