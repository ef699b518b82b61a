"""The result of an audit: one JSON document that meets a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cramlab import records
from cramlab.auditing.probes import MAIN
from cramlab.auditing.schemas import validate
from cramlab.files import write_text

KIND, SCHEMA_VERSION = "audit", 1
FILE = "audit.json"


@dataclass(frozen=True)
class AuditResult:
    """The result of an audit.

    Attributes:
        data: the JSON document, which meets `audit.schema.json`; an estimate is [value, low, high].
    """

    data: dict[str, Any]

    def layers(self, measure: str, probe: str = MAIN) -> list[list[float]]:
        """Returns `r`, `r_pooled`, `r2` or `cosine` of each layer's output, as estimates."""
        return self.data["probes"][probe]["layers"][measure]

    def overall(self, measure: str, probe: str = MAIN) -> list[float]:
        """Returns the same measure averaged over layers, as an estimate."""
        return self.data["probes"][probe]["overall"][measure]

    def with_control(self, name: str, content: dict[str, Any]) -> AuditResult:
        """Returns the result with a further control."""
        return AuditResult(self.data | {"controls": self.data["controls"] | {name: content}})

    def described(self, model: Mapping[str, Any], text: Mapping[str, Any]) -> AuditResult:
        """Returns the result with further fields that describe model and text."""
        return AuditResult(
            self.data | {"model": self.data["model"] | dict(model), "text": self.data["text"] | dict(text)}
        )

    def rounded(self) -> AuditResult:
        """Returns the result as it is written: numbers of six digits, None in place of NaN."""
        return AuditResult(records.finite(_rounded(self.data)))

    def write(self, path: Path) -> None:
        """Validates and writes the document, completely or not at all."""
        data = self.rounded().data
        validate(data, KIND, SCHEMA_VERSION, str(path))
        write_text(path, json.dumps(data, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> AuditResult:
        """Reads a document that `write` wrote.

        Raises:
            RecordError: when the file is not an audit of this schema version.
        """
        data = records.read_json(path)
        validate(data, KIND, SCHEMA_VERSION, str(path))
        return cls(data)


def _rounded(value: Any) -> Any:
    """Rounds every number to six digits; further digits are noise and make the file larger."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
