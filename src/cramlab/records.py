"""Results: one JSON document a run, with a schema. Analysis and reports see records and nothing else."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.exceptions
import torch

from cramlab.files import DamagedFileError, write_json

SCHEMA_VERSION = 1
# What may lie beside records, a run's config and the documents of audits and consolidations: their names up to a first
# hyphen, so that `comparison-stdlib-8192.json` is one of them.
_NO_RECORDS = {"config", "audit", "over_training", "comparison", "consolidation", "decode", "retrieval"}
# Timings, documents of `cramlab irregular`, language models, the campaign of faults, goals.
_NO_RECORDS_IN = {"bench", "irregular", "text", "reliability", "goals"}
_PACKAGES = ("cramlab", "torch", "numpy", "scipy", "lightning-fabric")


class RecordError(DamagedFileError):
    """A file that is no record of this version; the message says what is wrong and what to do."""


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema that every record meets."""
    text = importlib.resources.files("cramlab").joinpath("record.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def header(device: torch.device) -> dict[str, Any]:
    """What a record says of the code and of the machine whose `device` is used."""
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": _revision(),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in _PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "n_cores": os.cpu_count(),
            "n_threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
    }


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The header of a run that goes on: the newest, naming every revision that had a part in it."""
    revisions = [r for r in (before["revision"], now["revision"]) if r]
    return now | {"revision": ", ".join(dict.fromkeys(revisions)) or None}


def package_version(package: str) -> str | None:
    """The installed version of a package; None when it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Commit of the source tree, with `+` when it has been changed; None outside a checkout."""
    here = Path(__file__).parent

    def git(*command: str) -> str:  # that takes no lock of the user's repository, which a kill would leave behind
        found = subprocess.run(
            ["git", "--no-optional-locks", *command], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return found.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not someone else's checkout
        commit = git("describe", "--always", "--abbrev=12", "--exclude=*")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def finite(value: Any) -> Any:
    """NaN and infinities, which are no JSON, as null."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Validates a record and writes it whole or not at all; returns it as it can be read again."""
    record = finite(record)
    validate(record, str(path))
    write_json(path, record)
    return record


def read_json(path: Path) -> Any:
    """Reads JSON as the standard has it.

    Raises:
        RecordError: naming the file, when it is cut, no UTF-8, nested too deep, or holds NaN or an infinity.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}); it may have been cut off: run again") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read(path: Path) -> dict[str, Any]:
    """Reads and validates one record.

    Raises:
        RecordError: when the file is no JSON, of another schema version, or does not meet the schema.
    """
    record = read_json(path)
    validate(record, str(path))
    return record


def validate(record: Any, name: str) -> None:
    """Raises `RecordError` unless the record has this version and meets the schema."""
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{name} has schema_version {version!r}, this cramlab reads {SCHEMA_VERSION}; "
            "regenerate the record, or read it with the cramlab version that wrote it"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(record))
    if error is not None:
        where = ".".join(str(p) for p in error.absolute_path) or "the record"
        raise RecordError(f"{name}: {where}: {error.message}")


def find(paths: list[Path]) -> list[Path]:
    """The record files named by or lying under the given paths, in order of name; none in those of `_NO_RECORDS_IN`.

    Raises:
        RecordError: when a path does not exist or holds no record.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise RecordError(f"{path} does not exist; give a run folder, a folder of records or a record file")
        below = sorted(
            p
            for p in path.rglob("*.json")
            if p.is_file()
            and p.stem.partition("-")[0] not in _NO_RECORDS
            and _NO_RECORDS_IN.isdisjoint(p.relative_to(path).parts)
        )
        if not below:
            raise RecordError(f"{path} holds no record; is the run finished?")
        found += below
    return found
