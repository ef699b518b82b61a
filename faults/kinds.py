"""Kinds of faults that were once there: the project's own tests of each kind, run again."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from faults.cases import Case, Fault, FaultFoundError, Measured

ROOT = Path(__file__).parent.parent
KINDS: dict[str, tuple[str, ...]] = {
    "a patched model answers wrongly without a word": (
        "tests/consolidation/test_patched_masks.py",
        "tests/consolidation/test_patched_models.py",
        "tests/consolidation/test_patched_refusals.py",
        "tests/consolidation/test_attention.py",
    ),
    "a patched model cannot be copied, saved or loaded": ("tests/consolidation/test_copies_and_threads.py",),
    "the CRAM language model in Hugging Face habits": (
        "tests/language_model/test_packed_rows.py",
        "tests/language_model/test_cache.py",
        "tests/language_model/test_inputs.py",
        "tests/language_model/test_missing_weights.py",
        "tests/language_model/test_auto.py",
        "tests/hf/test_adapters.py",
        "tests/language_model/test_training.py",
    ),
    "weights that are not there, or damaged": (
        "tests/hf/test_loading.py",
        "tests/hf/test_weights.py",
        "tests/test_records.py",
        "tests/test_files.py",
    ),
    "finished or unfinished work of something else is taken": (
        "tests/training/test_folder.py",
        "tests/auditing/test_resume.py",
        "tests/training/irregular/test_study.py",
    ),
    "the promise's assumptions": ("tests/auditing/test_copies.py", "tests/consolidation/test_guarantee.py"),
    "code that is not ours runs": ("tests/hf/test_loading.py",),
    "settings": ("tests/test_config.py",),
    "files of users": ("tests/text", "tests/tasks/irregular"),
    "full disk and leftovers": ("tests/test_files.py",),
    "families": ("tests/hf/test_attention_sites.py", "tests/consolidation/test_patched_refusals.py"),
}


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:  # noqa: ARG001
    """One for each kind."""
    for kind, files in list(KINDS.items())[: max(1, round(share * len(KINDS)))]:
        yield Case("the project's own tests of faults that were once there", kind, functools.partial(_passes, files))


def _passes(files: tuple[str, ...]) -> Measured:
    """Raises unless every test of these files passes."""
    if missing := [file for file in files if not (ROOT / file).exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        ended = subprocess.run(
            [*command, f"--junitxml={report}", *files], cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ended.returncode}: {ended.stdout.strip()[-200:]}")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    n, bad = int(suite.attrib["tests"]), int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    if bad or ended.returncode:
        first = next((line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        raise FaultFoundError(Fault.WRONG, f"{bad} of {n} tests fail: {first}"[:240])
    return {"tried": n, "tests": n, "files": list(files)}
