"""The figures of a consolidation as text: the same for its page, the terminal and the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Fact(NamedTuple):
    """One statement on a consolidation.

    Attributes:
        what: name.
        value: value with its unit.
        worse: whether it is more than was promised, or than the original needs.
    """

    what: str
    value: str
    worse: bool = False


class CostRow(NamedTuple):
    """One quantity of both models.

    Attributes:
        what: name and unit.
        original: value for the original.
        consolidated: value for the consolidated model.
        ratio: the second divided by the first; for times the median over rounds.
        dearer: whether the ratio is above 1.
    """

    what: str
    original: str
    consolidated: str
    ratio: str
    dearer: bool


def chosen(record: Record) -> dict[str, Any]:
    """The test of the chosen threshold on the calibration documents."""
    return next(t for t in record["tested"] if t["skipped_frac"] == record["skipped_frac"])


def text_name(text: Mapping[str, Any]) -> str:
    """Name of a text with its version."""
    return f"{text['name']} ({text['version']})" if text.get("version") else str(text["name"])


def promise(record: Record) -> str:
    """The guarantee in one sentence."""
    promised, config = record["promise"], record["config"]
    on = record.get("calibrated_on", {"unit": "document", "shortest": config["context"], "longest": config["context"]})
    tokens = f"{on['longest']:,}" if on["shortest"] == on["longest"] else f"{on['shortest']:,} to {on['longest']:,}"
    weaker = f" {on['weaker'].capitalize()}." if "weaker" in on else ""
    return (
        f"With confidence {1 - promised['delta']:g}, the loss of a {on['unit']} of {text_name(record['text'])} with "
        f"{tokens} tokens increases by at most {promised['increase']:g} nats per token in "
        f"expectation.{weaker}"
    )


def promise_rows(record: Record) -> list[Fact]:
    """The guarantee, what it rests on, and what was measured on test documents."""
    promised, config, test, calibrated = record["promise"], record["config"], record["test"], chosen(record)
    error = "" if test["standard_error"] is None else f" ± {test['standard_error']:.4f}"
    rows = [
        Fact("guaranteed increase of the loss", f"at most {promised['increase']:g} nats per token"),
        Fact("confidence", f"{1 - promised['delta']:g}"),
        Fact("domain", text_name(record["text"])),
        Fact("length of a document", f"{config['context']:,} tokens"),
        Fact("calibration documents", f"{config['calibration_documents']}"),
        Fact("their mean increase", f"{calibrated['mean']:+.4f} nats per token"),
        Fact("smallest increase that they guarantee", f"{calibrated['upper_bound']:.4f} nats per token"),
        Fact("p-value", f"{calibrated['p_value']:.3g}"),
        Fact("largest increase that counts",
             f"{promised['bound']:g} nats per token, exceeded by {calibrated['n_capped']} of "
             f"{config['calibration_documents']} documents"),
        Fact("test documents", f"{test['documents']}"),
        Fact("their mean increase ± standard error", f"{test['increase']:+.4f}{error} nats per token",
             test["increase"] > promised["increase"]),
        Fact("far reads skipped on them", f"{test['skipped_frac']:.1%}"),
        Fact("causal pairs scored on them", f"{test['pairs_frac']:.1%}", test["pairs_frac"] > 1),
        Fact("window and first keys", f"{record['window']} and {record['n_sinks']}"),
    ]  # fmt: skip
    for other in record.get("lengths", []):
        found = other["test"]
        rows.append(
            Fact(f"holds at {other['length']:,} tokens as well; calibration documents", f"{other['documents']}")
        )
        rows.append(
            Fact(f"mean increase of {found['documents']} test documents at {other['length']:,} tokens",
                 f"{found['increase']:+.4f} nats per token, {found['skipped_frac']:.1%} of far reads skipped",
                 found["increase"] > promised["increase"])
        )  # fmt: skip
    if "learned_on" in record:
        rows.insert(4, Fact("learned on", text_name(record["learned_on"])))
    if copies := sum(record.get("copies", {}).values()):
        rows.append(Fact("documents left out as copies", f"{copies}"))
    return rows


def tested_rows(record: Record, in_use: Record | None, labels: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """Share skipped, mean increase and smallest guarantee of every tested threshold; then the measured baselines.

    Args:
        record: record of the consolidation.
        in_use: what was measured in use; None: nothing.
        labels: names of the baselines.
    """
    rows = [
        (f"calibration, {t['skipped_frac']:.0%}" + (" (chosen)" if t is chosen(record) else ""),
         f"{t['skipped_frac']:.0%}", f"{t['mean']:+.4f}", f"{t['upper_bound']:.4f}")
        for t in record["tested"]
    ]  # fmt: skip
    test = record["test"]
    rows.append(("test documents", f"{test['skipped_frac']:.1%}", f"{test['increase']:+.4f}", ""))
    if in_use is not None:
        own = {"name": "", "skipped_frac": in_use["skipped_frac"], "increase": in_use["increase"]}
        names = {"": "consolidated", **labels}
        rows += [
            (f"{names[b['name']]}, on {in_use['documents']} test documents", f"{b['skipped_frac']:.1%}",
             f"{b['increase']:+.4f}", "")
            for b in (own, *in_use["baselines"])
        ]  # fmt: skip
    return rows


def cost_rows(in_use: Record) -> list[CostRow]:
    """Time, pairs and bytes of both models."""
    cost = in_use["cost"]
    rows = []
    for stage, title in (
        ("prompt", f"prompt of {cost['prompt']['tokens']:,} tokens"),
        ("decode", f"a token after {cost['decode']['after']:,}"),
    ):
        both = [cost[stage][way] for way in ("original", "consolidated")]
        times = ["{median:,.2f} [{p10:,.2f}, {p90:,.2f}]".format(**way["ms"]) for way in both]
        rows.append(_cost_row(f"{title}: ms", times, 1 / both[1]["speedup"]["median"]))
        rows.append(_counted(f"{title}: pairs per head", [way["pairs"] for way in both]))
        if stage == "decode":
            rows.append(_counted(f"{title}: bytes of keys and values", [way["key_bytes"] for way in both]))
    sizes = cost["bytes"]
    rows.append(_counted("bytes of weights", [sizes["weights"], sizes["weights"] + sizes["patch"]]))
    rows.append(_counted("bytes of the cache", [sizes["cache"][way] for way in ("original", "consolidated")]))
    return rows


def _counted(what: str, values: Sequence[float]) -> CostRow:
    return _cost_row(what, [f"{value:,.0f}" for value in values], values[1] / values[0] if values[0] else 1.0)


def _cost_row(what: str, texts: Sequence[str], ratio: float) -> CostRow:
    return CostRow(what, texts[0], texts[1], f"{ratio:.2f}", ratio > 1)


def timed(in_use: Record) -> str:
    """How the times were measured, in one sentence."""
    cost, hardware = in_use["cost"], in_use["header"]["hardware"]
    where = hardware["accelerator"] or hardware["processor"] or hardware["machine"]
    return (
        f"Median [10%, 90%] of {cost['prompt']['original']['repeats']} prompts and "
        f"{cost['decode']['original']['repeats']} tokens (of fewer than ten: least and greatest), both models in turns "
        f"on {where}, {hardware['n_threads']} of {hardware['n_cores']} cores, {in_use['header']['date']}."
    )


def missing(record: Record, in_use: Record | None) -> str:
    """What a folder does not hold and how to get it; the empty text where it is complete."""
    if in_use is None:
        again = (
            "The command that made it measures them with --resume."
            if "made_of" in record
            else "cramlab consolidate with --from and this folder makes a new one with them."
        )
        return (
            "Reads by layer, the sample text, baselines and costs are missing: the folder was made by an earlier "
            f"version of cramlab, or copied without them. {again}"
        )
    return "The sample text was left out when the folder was shared." if in_use["sample"] is None else ""


def layer_ranges(layers: Sequence[int]) -> str:
    """Indices in ascending order as text, `0, 3-5`."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)
