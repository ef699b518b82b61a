"""The JSON Schemas of the documents that this package writes, and validation against them."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jsonschema
import jsonschema.exceptions

from cramlab import records


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """Returns the JSON Schema of a kind of document, "audit" or "over_training"."""
    text = importlib.resources.files("cramlab.auditing").joinpath(f"{kind}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def validate(data: Any, kind: str, version: int, name: str) -> None:
    """Checks that data are a document of this kind and version.

    Args:
        data: the document.
        kind: value that its field "kind" must have, and name of the schema.
        version: value that its field "schema_version" must have.
        name: name of the document in messages, such as its path.

    Raises:
        RecordError: when the document has another kind or version, or violates the schema; says where.
    """
    if not isinstance(data, dict) or (data.get("kind"), data.get("schema_version")) != (kind, version):
        found = (data.get("kind"), data.get("schema_version")) if isinstance(data, dict) else type(data).__name__
        raise records.RecordError(
            f'{name} is not a document of kind "{kind}" and schema_version {version}, but {found}; run the audit '
            "again, or read it with the version of cramlab that wrote it"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema(kind)).iter_errors(data))
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path) or "the document"
        raise records.RecordError(f"{name}: {where}: {error.message}")
