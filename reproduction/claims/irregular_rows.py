"""C8: real irregular series."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cramlab.report.intervals import Interval, seed_interval
from reproduction.claims.evidence import ClaimRow, Evidence
from reproduction.claims.verdict import Verdict, at_most, every
from reproduction.pages import markdown

Groups = Mapping[tuple[str, str], list[dict[str, Any]]]  # documents by data set and model
COMMAND = "cramlab irregular --data nafld2 --out runs/results/irregular"
FETCH = "the data have to be fetched by the user"
SIMPLE = "gradient-boosting"  # the usual method in practice
FEW = 0.17  # share of the visits that CRAM may attend at: the paper's on PhysioNet
LOST = 0.01  # largest lead in AUC of the best other model, for the whole interval over splits


def groups(evidence: Evidence) -> Groups:
    """Documents by data set and model, without those of models carried over."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for document in evidence.irregular:
        if "way" in document:
            continue
        found.setdefault((document["data"]["name"], document["model"]), []).append(document)
    return dict(sorted(found.items()))


def over_seeds(documents: Iterable[dict[str, Any]], name: str) -> Interval | None:
    """A test metric over seeds of splits; a mean alone for one of them."""
    tests = [document["test"] for document in documents]
    values = [test[name] for test in tests if test.get(name) is not None]
    if not values:
        return None
    interval = seed_interval(values)
    return interval if name == "forecast_skill_ratio" else interval.within(0.0, 1.0)


def table(found: Groups) -> str:
    """Table with a row for each model, with the lead of the simple baseline over it on the same splits."""
    if not found:
        return "No records yet.\n"
    columns = ("data", "model", "seeds", "AUC", "trees ahead by, on the same split", "average precision",
               "next-value error / last value", "attention_frac", "parameters", "minutes")  # fmt: skip
    rows = []
    for (data, model), documents in found.items():
        auc, *others = (
            _format(over_seeds(documents, name)) for name in ("auc", "average_precision", "forecast_skill_ratio")
        )
        ahead = "-" if model == SIMPLE else _format(lead(found.get((data, SIMPLE), []), documents))
        attention = over_seeds(documents, "attention_frac")
        minutes = sum(d["seconds"] for d in documents) / 60 / len(documents)
        parameters = documents[0]["n_parameters"]
        rows.append((data, model, str(len(documents)), auc, ahead, *others, _format(attention),
                     "-" if parameters is None else f"{parameters:,}", f"{minutes:.1f}"))  # fmt: skip
    return markdown.table(columns, rows)


def lead(documents: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]]) -> Interval | None:
    """AUC of a model minus that of another on the same splits, which vary more than models; None without any."""
    first, second = ({d["seed"]: d["test"]["auc"] for d in some} for some in (documents, others))
    common = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return seed_interval(common) if common else None


def _format(value: Interval | None) -> str:
    return "-" if value is None else value.format(3)


def rows(found: Groups) -> list[ClaimRow]:
    """Rows on the paper's data sets, which are not at hand, and on those that are."""
    made = [
        ClaimRow(
            claim="C8",
            what=what,
            paper=paper,
            ours=f"{why}; the loader is there and tested on files of the same format",
            command=f"cramlab irregular --data {name} --path {path} --out runs/{name}",
            verdict=Verdict.NOT_TESTABLE,
        )
        for name, path, what, paper, why in (
            ("physionet2012", "DIR", "PhysioNet 2012, AUC", "0.900 at 17% attention", FETCH),
            ("mimic3", "DIR", "MIMIC-III, AUC", "0.783 at 11% attention", "the data lie behind a registration"),
            ("person-activity", "FILE", "UCI person activity, accuracy", "0.181, SeqBoat 0.386", FETCH),
        )
    ]
    names = sorted({data for data, _ in found})
    if not names:
        made.append(ClaimRow(claim="C8", what="a real irregular series: CRAM against simple models", paper="-",
                             ours="-", command=COMMAND, verdict=Verdict.NOT_RUN))  # fmt: skip
    return made + [_data_row(data, found) for data in names]


def equal(ahead: Interval | None) -> Verdict:
    """Whether a lead is negligible: its whole interval over splits is at most `LOST`; refuted by one above 0."""
    verdict = at_most(ahead, LOST)
    if verdict is Verdict.NOT_RUN or verdict is Verdict.REPRODUCED or ahead is None or ahead.low is None:
        return verdict
    return Verdict.NOT_REPRODUCED if ahead.low > 0 else Verdict.UNDECIDED


def _data_row(data: str, found: Groups) -> ClaimRow:
    """Row: does CRAM reach the AUC of the best other model, the simple baseline included, at few of the visits?"""
    auc = {model: over_seeds(documents, "auc") for (name, model), documents in found.items() if name == data}
    cram, attention = auc.get("cram"), over_seeds(found.get((data, "cram"), []), "attention_frac")
    text = ", ".join(f"{model} {_format(value)}" for model, value in auc.items() if value is not None)
    if attention is not None:
        text += f"; CRAM attends at {attention.format(3)} of the visits"
    rivals = {model: value.mean for model, value in auc.items() if model != "cram" and value is not None}
    verdict = Verdict.NOT_RUN
    if cram is not None and attention is not None and rivals:
        best = max(rivals, key=lambda model: rivals[model])
        ahead = lead(found[data, best], found[data, "cram"])
        text += f"; {best} is the best other and ahead of CRAM by {_format(ahead)} on the same splits"
        verdict = every([equal(ahead), at_most(attention, FEW)])
    return ClaimRow(
        claim="C8",
        what=f"CRAM is as good as the best other model, with few reads, on {data}",
        paper="on other data",
        ours=text,
        command=f"cramlab irregular --data {data} --out runs/results/irregular",
        verdict=verdict,
    )
