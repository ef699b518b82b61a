"""Records: one JSON document per run, with a schema. Analysis and reports read records and nothing else."""

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cramlab.errors import UsageError
from cramlab.files import DamagedFileError, write_json

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
RUN = "run"  # the kind of a training run's record
# Documents written before the field `kind` existed, by fields that only this kind has.
_SIGNS: dict[str, frozenset[str]] = {
    RUN: frozenset({"config_hash", "series"}),
    "config": frozenset({"task", "training"}),
    "model config": frozenset({"model_type"}),
    "text": frozenset({"n_parameters", "series", "name"}),
    "consolidation": frozenset({"weights_sha256", "format"}),
    "comparison": frozenset({"sensitivity", "rows"}),
    "retrieval": frozenset({"prompts", "distance"}),
    "decoding": frozenset({"decode"}),
    "timing": frozenset({"fused_kernel", "took_s"}),
    "timings": frozenset({"parity", "rows"}),
}
_PACKAGES = ("cramlab", "torch", "numpy", "scipy", "lightning-fabric")


class RecordError(DamagedFileError):
    """A file is not a record of this schema version."""


class MissingRecordError(RecordError, UsageError):
    """A path does not exist, or holds no record."""


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a run's record."""
    text = importlib.resources.files("cramlab").joinpath("record.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def header(device: torch.device) -> dict[str, Any]:
    """Fields of a record that describe the code, the library versions and the machine.

    Args:
        device: device of the computation.
    """
    import torch

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
    """The header of a resumed run: `now`, with every revision of the code that contributed."""
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
    """The value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kind(document: Any) -> str | None:
    """The kind of a document: its field `kind`, or the kind that its fields imply if it is older than that field.

    Returns:
        "run" for a training run's record, "config", "audit", "irregular", ...; None for any other document.
    """
    if not isinstance(document, dict):
        return None
    if isinstance(document.get("kind"), str):
        return document["kind"]
    return next((name for name, fields in _SIGNS.items() if fields <= document.keys()), None)


def write(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Validates a run's record and writes the file atomically; returns the record as `read` returns it."""
    record = {"kind": RUN} | finite(record)
    validate(record, str(path))
    write_json(path, record)
    return record


def read_json(path: Path) -> Any:
    """Reads a file as standard JSON.

    Raises:
        RecordError: the file is cut off, not UTF-8, nested too deeply, or holds NaN or an infinity.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}); it may have been cut off: run again") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def read(path: Path) -> dict[str, Any]:
    """Reads and validates one run's record.

    Raises:
        RecordError: the file is not JSON, has another schema version, or does not meet the schema.
    """
    record = read_json(path)
    validate(record, str(path))
    return {"kind": RUN} | record


def validate(record: Any, name: str) -> None:
    """Raises `RecordError` unless the record has this schema version and meets the schema."""
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{name} has schema_version {version!r}, this cramlab reads {SCHEMA_VERSION}; "
            "regenerate the record, or read it with the cramlab version that wrote it"
        )
    if _meets_schema(record):
        return
    import jsonschema  # takes 0.1 s to import and 10 ms or more per record, so only a refused one is explained by it
    import jsonschema.exceptions

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(record))
    where = "the record" if error is None else ".".join(map(str, error.absolute_path)) or "the record"
    raise RecordError(f"{name}: {where}: {'does not meet the schema' if error is None else error.message}")


def _meets_schema(record: Any) -> bool:
    import fastjsonschema

    try:
        _compiled()(record)
    except fastjsonschema.JsonSchemaValueException:
        return False
    return True


@functools.cache
def _compiled() -> Callable[[Any], Any]:
    """The schema as a Python function, some fifty times as fast as `jsonschema`."""
    import fastjsonschema

    # The schema uses nothing that changed between draft 7, which the compiler knows, and draft 2020-12.
    return fastjsonschema.compile(schema() | {"$schema": "http://json-schema.org/draft-07/schema"})


Progress = Callable[[list[Path]], Iterable[Path]]  # yields the files one by one, such as a progress bar does


def find(paths: list[Path]) -> list[Path]:
    """The record files among `paths` and in the folders among them, in order of name.

    Documents of another kind are left out. A file that is named itself is always taken.

    Raises:
        MissingRecordError: a path does not exist or holds no record.
        RecordError: a file is not one of cramlab's documents.
    """
    return list(_found(paths, iter))


def read_all(paths: list[Path], progress: Progress = iter) -> list[dict[str, Any]]:
    """Reads and validates the records among `paths` and in the folders among them, each file once.

    Raises:
        RecordError: as `find` and `read` do.
    """
    found = _found(paths, progress)
    for path, record in found.items():
        validate(record, str(path))
    return [{"kind": RUN} | record for record in found.values()]


def _found(paths: list[Path], progress: Progress) -> dict[Path, Any]:
    """Record files with their content, which is not validated."""
    below: dict[Path, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise MissingRecordError(f"{path} does not exist; give a run folder, a folder of records or a record file")
        below[path] = [path] if path.is_file() else sorted(p for p in path.rglob("*.json") if p.is_file())
    found: dict[Path, Any] = {}
    for file in progress(list(dict.fromkeys(file for files in below.values() for file in files))):
        document = read_json(file)
        which = kind(document)
        if which == RUN or file in below:
            found[file] = document
        elif which is None:
            raise RecordError(
                f'{file} has no field "kind" and is not a document of cramlab; move it, or name the records themselves'
            )
    empty = next((path for path, files in below.items() if found.keys().isdisjoint(files)), None)
    if empty is not None:
        raise MissingRecordError(f"{empty} holds no record; is the run finished?")
    return found
