"""The report: one HTML file that opens from disk, with nothing to fetch."""

from __future__ import annotations

import importlib.resources
from typing import Any

import jinja2

from cramlab.report import plots
from cramlab.report.tables import COLUMNS, cells, origin, summarise
from cramlab.terminal import plain


def render(found: list[dict[str, Any]]) -> str:
    """The page for a set of records; failed runs are listed with their reason and drawn no further than they came."""
    found = sorted(plain(found), key=lambda r: (r["experiment"], r["size"], r["mixer"], r["seed"]))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = importlib.resources.files("cramlab.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    trained = [record for record in found if record["series"]]
    return environment.from_string(source).render(
        columns=COLUMNS,
        rows=[cells(row) for row in summarise(found)],
        failed=[record for record in found if record["status"] == "failed"],
        attention=plots.attention_over_steps(trained) if trained else "",
        retrieval=plots.retrieval_over_steps(trained) if trained else "",
        runs=[_run(record) for record in trained],
        origins=sorted({origin(record) for record in found}),
    )


def _run(record: dict[str, Any]) -> dict[str, Any]:
    """One run's own section."""
    return {
        "title": f"{record['experiment']} / {record['size']} / {record['mixer']}, seed {record['seed']}",
        "config_hash": record["config_hash"],
        "steps": record["n_steps"],
        "encoding_ended_step": record["encoding_ended_step"],
        "cooldown_from_step": record["cooldown_from_step"],
        "losses": plots.losses_over_steps(record),
        "raster": plots.routing_raster(record) if record["samples"] else "",
        "forecast": plots.forecast(record) if record["samples"] else "",
    }
