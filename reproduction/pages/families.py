"""docs/tables/families.md: which decoders of transformers are audited and consolidated, tried on tiny models.

`python -m reproduction.pages.families` tries every model of `reproduction.decoders` (half a minute on one core), writes
the record and renews the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cramlab import records
from cramlab.consolidation.patch.sites import consolidatable_sites, left_alone
from cramlab.errors import CramlabError
from cramlab.files import write_json
from cramlab.hf.attention_sites import attention_sites
from cramlab.hf.structure import text_config
from reproduction.decoders import DECODERS, REASONS, build
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "results" / "families" / "families.json", ROOT / "docs" / "tables" / "families.md"


def tried(model_type: str) -> dict[str, Any]:
    """What audit and patch make of the tiny model of a type: one row of the record."""
    model = build(model_type)
    row = {"model_type": model_type, "class": type(model).__name__, "n_layers": text_config(model).num_hidden_layers}
    try:
        row["audited"] = [site.layer for site in attention_sites(model)]
        row["patched"] = [site.layer for site in consolidatable_sites(model)]
        row["left_alone"] = {str(layer): reason for layer, reason in left_alone(model).items()}
    except CramlabError as error:
        row["refusal"] = str(error)
    return {"audited": [], "patched": [], "left_alone": {}, "refusal": None} | row


def measured() -> dict[str, Any]:
    """The record: a row for every type."""
    header = records.header(torch.device("cpu"))
    header["versions"]["transformers"] = records.package_version("transformers")
    rows = []
    for number, model_type in enumerate(DECODERS, start=1):
        rows.append(tried(model_type))
        print(f"{number} of {len(DECODERS)} {model_type}: {_line(rows[-1])[-1] or 'all layers'}", flush=True)
    return {"kind": "families"} | header | {"rows": rows}


def sections(record: dict[str, Any]) -> dict[str, str]:
    """The generated parts of the page."""
    rows: Sequence[dict[str, Any]] = record["rows"]
    patched, audited = (sum(bool(row[name]) for row in rows) for name in ("patched", "audited"))
    said = (
        f"transformers {record['versions']['transformers']}, torch {record['versions']['torch']}, {record['date']}: of "
        f"{len(rows)} types {patched} are consolidated and {audited} audited."
    )
    return {"families origin": said, "families": table(_COLUMNS, map(_line, rows))}


_COLUMNS = ("`model_type`", "class", "layers", "with attention", "consolidated", "why others are not")


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    reasons = dict.fromkeys(row["left_alone"].values())
    why = "; ".join(f"{list(row['left_alone'].values()).count(reason)} layers: {reason}" for reason in reasons)
    if row["refusal"]:
        why = next((name for name, pattern in REASONS.items() if re.search(pattern, row["refusal"])), row["refusal"])
    counts = (str(len(row[name]) or "none") for name in ("audited", "patched"))
    return f"`{row['model_type']}`", row["class"], str(row["n_layers"]), *counts, why


def read(path: Path = RECORD) -> dict[str, Any]:
    """The record."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_json(RECORD, measured())
    renew(PAGE, sections(read()))
