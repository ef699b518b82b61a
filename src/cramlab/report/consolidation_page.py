"""The page of a consolidation: one HTML file that opens from disk and fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cramlab.consolidation.in_use import BASELINES
from cramlab.report import consolidation_figures as figures
from cramlab.report import consolidation_plots as plots
from cramlab.report.tables import origin
from cramlab.report.template import template
from cramlab.terminal import plain

PAGE = "report.html"
_SHADES = 5  # shades of a token that reads


def render_consolidation(record: Mapping[str, Any], in_use: Mapping[str, Any] | None) -> str:
    """The page of one consolidation; what was not measured is left out and named.

    Args:
        record: record of the consolidation.
        in_use: what was measured in use, `consolidation.in_use.load_in_use`; None: nothing.
    """
    record = plain(dict(record))
    sample = None if in_use is None else in_use["sample"]
    return template("consolidation.html.jinja").render(
        record=record,
        promise=figures.promise(record),
        promise_rows=figures.promise_rows(record),
        missing=figures.missing(record, in_use),
        tested_rows=figures.tested_rows(record, in_use, BASELINES),
        loss=plots.loss_by_skipped(record, in_use, BASELINES),
        in_use=in_use,
        reads="" if in_use is None else plots.reads_by_layer(in_use),
        tokens=[] if in_use is None or sample is None else _tokens(record, in_use, sample),
        document="" if sample is None else plain(sample["document"]),
        shades=range(1, _SHADES + 1),
        costs=[] if in_use is None else figures.cost_rows(in_use),
        timed="" if in_use is None else figures.timed(in_use),
        origins=_origins(record, in_use),
    )


def _tokens(record: Mapping[str, Any], in_use: Mapping[str, Any], sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Text, shade and remark of each token of the sample; shade -1: it has no far keys."""
    near, layers = record["window"] + record["n_sinks"], in_use["layers"]
    columns = (sample["pieces"], sample["reads"], sample["loss"], sample["original"])
    found = []
    for i, (piece, read, loss, original) in enumerate(zip(*columns, strict=True), start=sample["first"]):
        shade = -1 if i < near else -(-_SHADES * len(read) // len(layers))
        which = figures.layer_ranges([layers[index] for index in read])
        remark = "no far keys" if i < near else f"{len(read)} of {len(layers)} layers read" + f": {which}" * bool(which)
        if loss is not None and original is not None:
            remark += f"; loss {loss:.3f} nats, original {original:.3f}"
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
        found.append({"text": text, "shade": shade, "remark": f"token {i}: {remark}"})
    return found


def _origins(record: Mapping[str, Any], in_use: Mapping[str, Any] | None) -> list[str]:
    """Hardware, code and versions of the learning and of what was measured in use."""
    machine = {"accelerator": None, "processor": None, "machine": "", "n_threads": "-", "n_cores": "-"}
    learned = {**record, "date": "learned", "hardware": machine | record["hardware"]}
    return [origin(learned), *(() if in_use is None else (origin(plain(in_use["header"])),))]
