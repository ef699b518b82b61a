"""A consolidation for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cramlab.consolidation.in_use import BASELINES
from cramlab.report import consolidation_figures as figures
from cramlab.terminal import plain


def consolidation_table(record: Mapping[str, Any], in_use: Mapping[str, Any] | None) -> Group:
    """The tables of the page: promise, tested thresholds, reads by layer, costs; what is dearer stands in red.

    Args:
        record: record of the consolidation.
        in_use: what was measured in use; None: nothing.
    """
    record = plain(dict(record))
    promised = Table(title=Text(record["name"]), show_header=False)
    for row in figures.promise_rows(record):
        promised.add_row(row.what, Text(row.value, style="red" if row.worse else ""))
    tested = Table("on", "far reads skipped", "loss increase", "smallest guarantee")
    for cells in figures.tested_rows(record, in_use, BASELINES):
        tested.add_row(*cells)
    parts: list[RenderableType] = [promised, tested]
    if in_use is not None:
        shares = zip(in_use["layers"], in_use["reads"]["by_layer"], strict=True)
        parts.append(Text("far reads made by layer: " + ", ".join(f"{layer}: {share:.0%}" for layer, share in shares)))
        cost = Table("cost", "original", "consolidated", "ratio")
        for what, original, consolidated, ratio, dearer in figures.cost_rows(in_use):
            style = "red" if dearer else ""
            cost.add_row(what, original, consolidated, Text(ratio + " (more)" * dearer, style=style))
        parts += [cost, Text(figures.timed(in_use))]
    if said := figures.missing(record, in_use):
        parts.append(Text(said, style="red"))
    return Group(*parts)
