"""The card of a shared consolidation: the README.md of its folder, made from its record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cramlab.report import consolidation_figures as figures
from cramlab.report.template import template
from cramlab.terminal import plain

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def render_card(
    record: Mapping[str, Any],
    in_use: Mapping[str, Any] | None,
    *,
    repository: str,
    base_model: str | None = None,
    licence: str | None = None,
) -> str:
    """The card of one consolidation, in Markdown with a header for the hub.

    Args:
        record: record of the consolidation.
        in_use: what was measured in use; None: nothing.
        repository: name that the folder is loaded by.
        base_model: name that the model is loaded by; None: the one in the record.
        licence: name of a licence for the header; None: the header names none.
    """
    record = plain(dict(record))
    name = base_model or record["name"]
    return template("card.md.jinja").render(
        record=record,
        name=name,
        hub_name=name if _HUB_NAME.fullmatch(name) else "",
        repository=repository,
        license=licence,
        promise=figures.promise(record),
        promise_rows=figures.promise_rows(record),
        costs=[] if in_use is None else figures.cost_rows(in_use),
        timed="" if in_use is None else figures.timed(in_use),
        text=figures.text_name(record.get("learned_on") or record["text"]),
    )
