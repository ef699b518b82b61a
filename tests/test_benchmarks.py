"""The benchmarks run, and refuse what they must; nothing here is about how fast anything is."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator

    yield accelerator
    for name in ("accelerator", "accelerator_page", "rows", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_holds_and_notices_when_it_does_not(accelerator, dtype, monkeypatch):
    where = accelerator.rows.Where(torch.device("cpu"), dtype)
    assert accelerator.parity(where, 40)["holds"]
    read = accelerator.rows.EpisodicMemory.read
    monkeypatch.setattr(
        accelerator.rows.EpisodicMemory,
        "read",
        lambda self, h, reads, written, **more: read(self, h, reads, written, **more) * (1.0 if reads is None else 1.1),
    )
    assert not accelerator.parity(where, 40)["holds"]


def test_every_measurement_is_made_once_and_kept(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "compiled", lambda *_: {"ways": {}})  # takes half a minute to compile
    monkeypatch.setattr(accelerator, "SHARES", (0.1, 1.0))
    monkeypatch.setattr(accelerator.rows, "repeats_at", lambda *_: 1)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--longest", "32", "--out", str(tmp_path)])
    monkeypatch.setattr(accelerator.rows.decode.__wrapped__, "__defaults__", (1, 1, accelerator.rows.CPU))
    assert accelerator.main() == 0
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"ceilings.json", "decode-32.json", "parity-bfloat16.json", "scores-32-0.1.json"} <= set(made)
    assert accelerator.main() == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    page = accelerator.accelerator_page.section(tmp_path)
    assert "a dry run" in page
    assert "| episodic tier with projections | 32 | 8 |" in page
    (tmp_path / "tier-32-by-1.json").unlink()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert accelerator.main() == 3
    assert not (tmp_path / "tier-32-by-1.json").exists()


def test_a_measurement_that_fails_or_never_ends_says_so(accelerator, tmp_path, monkeypatch):
    found = accelerator.measured(lambda: {}["nothing"])
    assert found["failed"].startswith("KeyError in test_benchmarks.py")
    monkeypatch.setattr(accelerator, "UNIT_S", 1)
    assert "longer than 1 s" in accelerator.measured(lambda: time.sleep(30))["failed"]


def test_without_parity_nothing_is_timed(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "parity", lambda *_: {"holds": False})
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--longest", "32", "--out", str(tmp_path)])
    assert accelerator.main() == 1
    assert {path.stem.partition("-")[0] for path in tmp_path.iterdir()} == {"kernel", "parity"}


def test_goals_are_judged_by_what_was_measured(accelerator):
    def way(ms):
        spread = {"p10": ms, "median": ms, "p90": ms}
        return {"ms": spread, "speedup": spread}

    record = {"what": "tier", "n_tokens": 16384, "least": {"routed": {"flops": 1e9, "bytes": 1e6}}}
    ways = {"dense": way(1.0), "routed": way(0.5), "dense, as a graph": way(0.9), "routed, as a graph": way(0.03)}
    found = {"tier-16384-by-1": record | {"ways": ways}, "training-16384-by-8": {"failed": "out of memory"}}
    found["ceilings"] = {"product_flops_per_s": 1e14, "copy_bytes_per_s": 1e12}
    for n, ms in ((1024, 30.0), (65536, 33.0)):
        found[f"decode-{n}"] = {"what": "decode", "n_tokens": n, "n_steps": 30, "ways": {"cram": way(ms)}}
    goals = {what: rest for what, *rest in accelerator.accelerator_page._goals(found)}
    _, reached, binds = goals["episodic tier, 1.6% read, 16,384 tokens, batch 1"]
    assert reached == "30.0x (launch by launch 2.0x)"  # against the faster of the dense ways
    assert "launches" in binds
    assert "0.010 of 0.030 ms" in binds
    assert goals["layer, training step, 16,384 tokens, batch 8"] == ["3x", "not measured", "out of memory"]
    assert "1.10 times as long" in goals["decode, a token, four layers"][1]


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
