"""C6 on real irregular series: memory and router of SRCD with a new embedding and new heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cramlab.report.intervals import Interval, seed_interval
from reproduction.claims.evidence import ClaimRow, Evidence
from reproduction.claims.irregular_rows import equal, over_seeds
from reproduction.claims.transfer_rows import CLAIMED
from reproduction.claims.verdict import Verdict, at_least, every
from reproduction.pages import markdown

Groups = Mapping[tuple[str, str, str], list[dict[str, Any]]]  # documents by data set, mixer and way
COMMAND = (
    "cramlab irregular --data {data} --source runs/results/transfer/cram-source-seed0 --out runs/results/irregular"
)
LEAST = 0.001  # share of visits below which no reads can be saved


def groups(evidence: Evidence) -> Groups:
    """Documents by data set, mixer and way."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for document in evidence.irregular:
        if "way" in document:
            found.setdefault((document["data"]["name"], document["model"], document["way"]), []).append(document)
    return dict(sorted(found.items()))


def table(found: Groups) -> str:
    """Table with a row for each way; "" without documents."""
    if not found:
        return ""
    columns = ("data", "model", "way", "seeds", "AUC", "AUC over scratch, by seed", "next-value error / last value",
               "attention_frac", "training reads to the best epoch", "of visits")  # fmt: skip
    cells = []
    for (data, model, way), documents in found.items():
        reads, visits = ([float(d[name]) for d in documents] for name in ("train_reads", "train_visits"))
        gain = _gain(found, data, model, way)
        cells.append(
            (data, model, way, str(len(documents)), _text(over_seeds(documents, "auc")),
             "-" if way == "scratch" or gain is None else gain.format(3),
             _text(over_seeds(documents, "forecast_skill_ratio")), _text(over_seeds(documents, "attention_frac"), 4),
             f"{sum(reads) / len(reads):,.0f}", f"{sum(visits) / len(visits):,.0f}")
        )  # fmt: skip
    return markdown.table(columns, cells)


def _text(value: Interval | None, digits: int = 3) -> str:
    return "-" if value is None else value.format(digits)


def _gain(found: Groups, data: str, model: str, way: str) -> Interval | None:
    """AUC minus that of training from scratch on the same split."""
    scratch = {d["seed"]: d["test"]["auc"] for d in found.get((data, model, "scratch"), [])}
    gains = [d["test"]["auc"] - scratch[d["seed"]] for d in found[data, model, way] if d["seed"] in scratch]
    return seed_interval(gains) if gains else None


def rows(found: Groups) -> list[ClaimRow]:
    """A row for each data set."""
    names = sorted({data for data, model, way in found if (model, way) == ("cram", "embedding")})
    if not names:
        return [_claim("pbcseq", "-", Verdict.NOT_RUN)]
    return [_data_row(data, found) for data in names]


def _claim(data: str, ours: str, verdict: Verdict) -> ClaimRow:
    return ClaimRow(
        claim="C6", what=f"memory and router frozen, embedding and heads new, on {data}: about half the reads",
        paper="PhysioNet 0.900 at 0.169 (52% fewer), activity 0.181 at 0.182 (48%)", ours=ours,
        command=COMMAND.format(data=data), verdict=verdict,
    )  # fmt: skip


def _data_row(data: str, found: Groups) -> ClaimRow:
    """Row on the reads saved at equal AUC; not testable if training from scratch hardly reads."""
    used = {way: over_seeds(found.get((data, "cram", way), []), "attention_frac") for way in ("scratch", "embedding")}
    gain = _gain(found, data, "cram", "embedding")
    scratch, carried = used["scratch"], used["embedding"]
    if scratch is None or carried is None or gain is None:
        return _claim(data, "-", Verdict.NOT_RUN)
    text = f"attention {carried.format(4)} against {scratch.format(4)} from scratch, AUC higher by {gain.format(3)}"
    if scratch.mean < LEAST:
        text += "; from scratch it reads next to nothing, so nothing can be saved"
        more = at_least(carried, LEAST) is Verdict.REPRODUCED
        return _claim(data, text, Verdict.NOT_REPRODUCED if more else Verdict.NOT_TESTABLE)
    saved = at_least(_spared(found, data), 0.0)
    return _claim(data, text, every([equal(gain.negative()), saved]))


def _spared(found: Groups, data: str) -> Interval | None:
    """Reads that the claim allows (a share of those from scratch) minus the model's own, by split."""
    scratch, own = ({d["seed"]: d["test"]["attention_frac"] for d in found[data, "cram", way]}
                    for way in ("scratch", "embedding"))  # fmt: skip
    spared = [(1 - CLAIMED) * scratch[seed] - own[seed] for seed in sorted(scratch.keys() & own.keys())]
    return seed_interval(spared) if spared else None
