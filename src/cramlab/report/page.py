"""The report: one HTML file that opens from disk and fetches nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from cramlab.report import plots
from cramlab.report.tables import COLUMNS, Row, cells, origin, summarise
from cramlab.report.template import template
from cramlab.terminal import plain

_RUNS_PER_FIGURE = 12  # up to here, each run has a label of its own
_MIXERS_PER_TABLE = 5  # columns that fit into a page of 1,100 pixels


Progress = Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]]


def render(found: list[dict[str, Any]], progress: Progress = iter) -> str:
    """The page for a set of records; a failed run is listed with its reason, and its curves end where it failed.

    Args:
        found: records.
        progress: takes the runs that are drawn and yields them one by one, such as a progress bar.
    """
    found = sorted(plain(found), key=lambda r: (r["experiment"], r["size"], r["mixer"], r["seed"]))
    trained = [record for record in found if record["series"]]
    return template("page.html.jinja").render(
        groups=_groups(summarise(found)),
        failed=[record for record in found if record["status"] == "failed"],
        attention=[plots.attention_over_steps(*figure) for figure in _figures(trained)],
        retrieval=[plots.retrieval_over_steps(*figure) for figure in _figures(trained)],
        runs=[_run(record) for record in progress(trained)],
        paths=plots.PATH_COLOURS,
        marks=plots.QUERY_MARKS,
        origins=sorted({origin(record) for record in found}),
    )


def _groups(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One group for each experiment and size; its tables have a column for each mixer and a row for each metric."""
    first = COLUMNS.index("mixer")
    groups = []
    for (experiment, size), members in itertools.groupby(rows, key=lambda row: (row.experiment, row.size)):
        columns = [cells(row)[first:] for row in members]
        parts = [columns[i : i + _MIXERS_PER_TABLE] for i in range(0, len(columns), _MIXERS_PER_TABLE)]
        tables = [
            {
                "mixers": [column[0] for column in part],
                "rows": list(
                    zip(COLUMNS[first + 1 :], zip(*(column[1:] for column in part), strict=True), strict=True)
                ),
            }
            for part in parts
        ]
        groups.append({"title": f"{experiment}, size {size}", "parts": tables})
    return groups


def _figures(trained: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], str]]:
    """Runs that share a figure, and its title: all runs if they are few, else those of one experiment and size."""
    if len(trained) <= _RUNS_PER_FIGURE:
        return [(trained, "")] if trained else []
    groups = itertools.groupby(trained, key=lambda r: (r["experiment"], r["size"]))
    return [(list(runs), f"{experiment}, size {size}") for (experiment, size), runs in groups]


def _run(record: dict[str, Any]) -> dict[str, Any]:
    """One run's own section."""
    return {
        "title": f"{record['experiment']} / {record['size']} / {record['mixer']}, seed {record['seed']}",
        "config_hash": record["config_hash"],
        "steps": record["n_steps"],
        "encoding_ended_step": record["encoding_ended_step"],
        "cooldown_from_step": record["cooldown_from_step"],
        "losses": plots.losses_over_steps(record) if any(row.get("loss") for row in record["series"]) else "",
        "raster": plots.routing_raster(record) if record["samples"] else "",
        "forecast": plots.forecast(record) if record["samples"] and record["samples"][0]["level"] else "",
    }
