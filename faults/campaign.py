"""Runs the parts of the campaign and writes a record of each: tests, failures, and commands that repeat them."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.files import write_json
from faults.cases import Case, Verdict, judge

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "reliability"
KIND, VERSION = "reliability", 1
# The parts in the order in which they begin, the longest first, with the seconds that a case of each may take.
PARTS = {
    "kills": 600.0, "inputs": 60.0, "equalities": 120.0, "disk": 300.0, "promises": 60.0, "threads": 120.0,
    "decisions": 900.0, "kinds": 600.0,
}  # fmt: skip
PACKAGES = ("transformers", "safetensors", "tokenizers", "scikit-learn")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every part could be run, whatever it found."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--only", metavar="NAME", help="run the cases whose name begins so, and write nothing")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="parts at a time (default: 2)")
    parser.add_argument("--again", action="store_true", help="also parts whose record is of this very code")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"part {part!r} is unknown; known: {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    if args.only is not None:
        return _replay(parts, args.seed, args.only)
    left = [part for part in parts if args.again or not _is_done(args.out / f"{part}.json", args.seed)]
    for part in parts:
        if part not in left:
            print(f"{part}: kept, of this very code", flush=True)
    if len(left) > 1:
        more = [f"--seed={args.seed}", f"--out={args.out}", "--again"]
        with ThreadPoolExecutor(args.jobs) as pool:
            calls = [[sys.executable, "-m", "faults", part, *more] for part in left]
            return max(pool.map(lambda call: subprocess.run(call, cwd=ROOT, check=False).returncode, calls))
    for part in left:
        write_json(args.out / f"{part}.json", run(part, args.seed))
    return 0


def run(part: str, seed: int) -> dict[str, Any]:
    """Runs all cases of a part; returns its record."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    head = records.header(torch.device("cpu"))
    head["versions"] |= {name: records.package_version(name) for name in PACKAGES}
    found = list(_shown(part, verdicts(part, cases_of(part, seed))))
    return records.finite(
        head
        | {"kind": KIND, "version": VERSION, "part": part, "seed": seed, "code": code_digest()}
        | {"seconds": round(time.monotonic() - begin, 1)}
        | summary(part, seed, found)
    )


def cases_of(part: str, seed: int, share: float = 1.0) -> list[Case]:
    """The cases of a part.

    Args:
        part: a name in `PARTS`.
        seed: of every random choice.
        share: of the cases that the generators make; smaller for a quick look.
    """
    return list(importlib.import_module(f"faults.{part}").cases(seed, share))


def verdicts(part: str, cases: Iterable[Case]) -> Iterator[Verdict]:
    """Runs cases, each for as long as its part allows."""
    for case in cases:
        yield judge(case, PARTS[part])


def summary(part: str, seed: int, found: list[Verdict]) -> dict[str, Any]:
    """Numbers of tries and failures by test, every failure with the call that repeats it, and what was measured."""
    tests: dict[str, dict[str, int]] = {}
    for verdict in found:
        row = tests.setdefault(verdict.test, {"tried": 0, "failed": 0, "refused": 0})
        row["tried"] += verdict.tried
        row["failed"] += verdict.fault is not None
        row["refused"] += verdict.refused
    failures = [
        {
            "test": verdict.test,
            "case": verdict.name,
            "fault": str(verdict.fault),
            "message": verdict.message,
            "replay": f"python -m faults {part} --seed {seed} --only {json.dumps(verdict.name)}",
        }
        for verdict in found
        if verdict.fault is not None
    ]
    measured = [{"test": v.test, "case": v.name} | dict(v.measured) for v in found if set(v.measured) - {"tried"}]
    return {
        "tried": sum(row["tried"] for row in tests.values()),
        "failed": len(failures),
        "tests": [{"test": name} | row for name, row in tests.items()],
        "failures": failures,
        "measured": measured,
        "not_here": [{"test": v.test, "case": v.name, "why": v.message} for v in found if v.tried == 0],
    }  # fmt: skip


def code_digest() -> str:
    """First 16 hex digits of the SHA-256 of all sources of the library and of the campaign."""
    sha = hashlib.sha256()
    for folder in (ROOT / "src", ROOT / "faults"):
        for path in sorted(folder.rglob("*.py")):
            sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def _is_done(path: Path, seed: int) -> bool:
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["code"] == code_digest() and record["seed"] == seed


def _shown(part: str, found: Iterator[Verdict]) -> Iterator[Verdict]:
    """Passes verdicts on and prints progress from time to time."""
    tried = failed = 0
    shown = time.monotonic()
    for verdict in found:
        tried, failed = tried + verdict.tried, failed + (verdict.fault is not None)
        if verdict.fault is not None:
            print(f"{part}: {verdict.name}: {verdict.fault}: {verdict.message}", flush=True)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{part}: {tried} tried, {failed} failed", flush=True)
        yield verdict
    print(f"{part}: done, {tried} tried, {failed} failed", flush=True)


def _replay(parts: list[str], seed: int, name: str) -> int:
    """Runs some cases and prints the verdict of each."""
    torch.set_num_threads(1)
    n_failed = 0
    for part in parts:
        cases = cases_of(part, seed)
        exact = [case for case in cases if case.name == name]
        for verdict in verdicts(part, exact or [case for case in cases if case.name.startswith(name)]):
            n_failed += verdict.fault is not None
            said = verdict.fault or ("refused, which is right" if verdict.refused else "held")
            print(f"{part}: {verdict.name}: {said}{': ' if verdict.message else ''}{verdict.message}")
    return min(n_failed, 1)
