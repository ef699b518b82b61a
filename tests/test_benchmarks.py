"""The benchmarks run, and refuse what they must; nothing here is about how fast anything is."""

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
