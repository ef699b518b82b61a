"""The document of one model and seed: how it is written, loaded, and compared with a request."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.config import differing
from cramlab.files import write_json
from cramlab.records import RecordError

KIND, VERSION = "irregular", 1
FILE = "irregular.json"
ADVICE = "move it away and run again, or choose another --out"
_FIELDS = {"data": dict, "config": dict, "test": dict, "model": str, "seed": int}


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a document with the digest of its content, completely or not at all."""
    write_json(path, document | {"sha256": _digest(document)})


def load(path: Path) -> dict[str, Any]:
    """Loads an intact document, without the digest of its content.

    Raises:
        RecordError: when the file is damaged, was changed after it was written, or has another kind or version.
    """
    try:
        document = records.read_json(path)
    except (RecordError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is damaged ({error}); {ADVICE}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND or document.get("version") != VERSION:
        raise RecordError(f"{path} is not a document of `cramlab irregular`, version {VERSION}; {ADVICE}")
    stored = document.pop("sha256", None)
    intact = stored == _digest(document) if "asked" in document or stored is not None else True
    if not intact or any(not isinstance(document.get(name), kind) for name, kind in _FIELDS.items()):
        raise RecordError(f"{path} is damaged (its content differs from what was written); {ADVICE}")
    return document


def unlike(document: dict[str, Any], head: dict[str, Any], source: dict[str, Any] | None) -> list[str]:
    """Returns the names of the fields in which a document differs from a request.

    Args:
        document: a loaded document.
        head: head of the requested document: model, way, seed, data and `asked`, its digests and settings.
        source: description of the requested source; None: no model is transferred.
    """
    names = ("model", "way", "seed", "asked")
    if "asked" in document:
        now = {name: head.get(name) for name in names} | {"data": head["data"]["name"]}
        held = {name: document.get(name) for name in names} | {"data": document["data"].get("name")}
        return [*differing(now, held)]
    # Documents of earlier versions have no digests. Their description of data and settings is compared instead; it must
    # include the hash of the data's tables.
    held = {"model": document["model"], "way": document.get("way"), "seed": document["seed"],
            "data": document["data"], "config": document["config"]}  # fmt: skip
    now = {name: head.get(name) for name in names[:3]} | {"data": head["data"], "config": head["asked"]["settings"]}
    if source is not None:
        held["source"], now["source"] = document.get("source"), source
    if document.get("way") == "random":  # the rate of the random router is not a setting
        held["config"] = {"fit": held["config"].get("fit")}
    unknown = [] if "SHA-256" in str(held["data"].get("origin")) else ["data_sha256, which the document does not hold"]
    return [*differing(_part(held, now), _part(now, held)), *unknown]


def _part(whole: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `whole` that `like` has too."""
    return {
        name: _part(value, like[name]) if isinstance(value, dict) and isinstance(like[name], dict) else value
        for name, value in whole.items()
        if name in like
    }


def _digest(document: dict[str, Any]) -> str:
    """Returns the SHA-256 of a document's canonical JSON without date, revision and durations."""
    rest = {name: value for name, value in document.items() if name not in ("date", "revision", "seconds", "elapsed_s")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
