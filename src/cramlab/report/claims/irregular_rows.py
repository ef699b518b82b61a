"""C8: real irregular series."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cramlab.report.claims.evidence import ClaimRow, Evidence, Verdict, markdown
from cramlab.report.tables import Interval, seed_interval

COMMAND = "cramlab irregular --data nafld2 --out runs/results/irregular"
LOST = 0.01  # AUC by which the best other model may be ahead; intervals over people are too wide to be the test


def groups(evidence: Evidence) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Documents by data set and model, without those of models carried over."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for document in evidence.irregular:
        if "way" in document:
            continue
        found.setdefault((document["data"]["name"], document["model"]), []).append(document)
    return dict(sorted(found.items()))


def over_seeds(documents: Iterable[dict[str, Any]], name: str) -> Interval | None:
    """A test metric over seeds of splits; for one seed the interval over its patients."""
    tests = [document["test"] for document in documents]
    values = [test[name] for test in tests if test.get(name) is not None]
    if not values:
        return None
    if len(values) == 1 and name == "auc":
        return Interval(mean=values[0], low=tests[0]["auc_low"], high=tests[0]["auc_high"])
    interval = seed_interval(values)
    return interval if name == "forecast_skill_ratio" else interval.within(0.0, 1.0)


def table(evidence: Evidence) -> str:
    """A row a model."""
    found = groups(evidence)
    if not found:
        return "No records yet.\n"
    columns = ("data", "model", "seeds", "AUC", "average precision", "next-value error / last value", "attention_frac",
               "parameters", "minutes")  # fmt: skip
    rows = []
    for (data, model), documents in found.items():
        cells = [_format(over_seeds(documents, name)) for name in ("auc", "average_precision", "forecast_skill_ratio")]
        attention = over_seeds(documents, "attention_frac")
        minutes = sum(d["seconds"] for d in documents) / 60 / len(documents)
        parameters = documents[0]["n_parameters"]
        rows.append((data, model, str(len(documents)), *cells, _format(attention),
                     "-" if parameters is None else f"{parameters:,}", f"{minutes:.1f}"))  # fmt: skip
    return markdown(columns, rows)


def _format(value: Interval | None) -> str:
    return "-" if value is None else value.format(3)


def rows(evidence: Evidence) -> list[ClaimRow]:
    """The paper's data sets, which are not at hand, and the two that are."""
    made = [
        ClaimRow(
            claim="C8",
            what=what,
            paper=paper,
            ours="the data lie behind a registration; the loader is there and tested on files of the same format",
            command=f"cramlab irregular --data {name} --path DIR --out runs/{name}",
            verdict=Verdict.NOT_TESTABLE,
        )
        for name, what, paper in (
            ("physionet2012", "PhysioNet 2012, AUC", ".900 at 17% attention"),
            ("mimic3", "MIMIC-III, AUC", ".783 at 11% attention"),
            ("person-activity", "UCI person activity, accuracy", ".181, SeqBoat .386"),
        )
    ]
    found = groups(evidence)
    names = sorted({data for data, _ in found})
    if not names:
        made.append(ClaimRow(claim="C8", what="a real irregular series: CRAM against simple models", paper="-",
                             ours="-", command=COMMAND, verdict=Verdict.NOT_RUN))  # fmt: skip
    return made + [_data_row(data, found) for data in names]


def _data_row(data: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> ClaimRow:
    """Does CRAM reach full attention's AUC with fewer reads, and the simple baseline's at all?"""
    auc = {model: over_seeds(documents, "auc") for (name, model), documents in found.items() if name == data}
    cram, attention = auc.get("cram"), over_seeds(found.get((data, "cram"), []), "attention_frac")
    text = ", ".join(f"{model} {_format(value)}" for model, value in auc.items() if value is not None)
    if attention is not None:
        text += f"; CRAM attends at {attention.format(3)} of the visits"
    verdict = Verdict.NOT_RUN
    if cram is not None:
        rivals = [value.mean for model, value in auc.items() if model != "cram" and value is not None]
        verdict = Verdict.REPRODUCED if rivals and cram.mean >= max(rivals) - LOST else Verdict.NOT_REPRODUCED
    return ClaimRow(
        claim="C8",
        what=f"CRAM is as good as the best other model, with few reads, on {data}",
        paper="on other data",
        ours=text,
        command=f"cramlab irregular --data {data} --out runs/results/irregular",
        verdict=verdict,
    )
