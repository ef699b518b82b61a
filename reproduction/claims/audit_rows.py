"""C1 and C2: redundancy of attention in pretrained models, and its change during training."""

from __future__ import annotations

import functools
from typing import Any

from cramlab.report import intervals
from reproduction.claims.evidence import ClaimRow, Evidence, interval_of
from reproduction.claims.verdict import Verdict, at_least, every

estimate = functools.partial(intervals.estimate, form=".2f")
FROM_STEP = 10_000  # step of training from which the paper's R rises; the claim leaves open what happens before


def rows(evidence: Evidence) -> list[ClaimRow]:
    """A row for each figure of every audit, and one for the audit over training."""
    made = [
        ClaimRow(
            claim="C1",
            what="R of GPT-2, 124M and 355M",
            paper="0.84 and 0.92, mean 0.88",
            ours="the weights are behind a model hub; the loader is there",
            command="cramlab audit gpt2 --text stdlib --out runs/gpt2",
            verdict=Verdict.NOT_TESTABLE,
        )
    ]
    if not evidence.audits:
        made.append(
            _not_run(
                "C1",
                "R of a pretrained model",
                "0.84 or more",
                "cramlab audit glassllm --text stdlib --out runs/glassllm",
            )
        )
    for model, data in sorted(evidence.audits.items()):
        made += _model(model, data)
    made.append(_training(evidence.over_training))
    return made


def _not_run(claim: str, what: str, paper: str, command: str) -> ClaimRow:
    return ClaimRow(claim=claim, what=what, paper=paper, ours="-", command=command, verdict=Verdict.NOT_RUN)


def _model(model: str, data: dict[str, Any]) -> list[ClaimRow]:
    command = f"cramlab audit {model} --text stdlib --out runs/{model}"
    overall = data["probes"]["hidden"]["overall"]
    mean = data["probes"]["mean"]["overall"]["r"]
    shares = data["head_shares"]["r"]
    heads = shares["above_0.8"]
    found = data["verdict"]
    layers = data["probes"]["hidden"]["layers"]["r"]
    middle = sorted(layers[len(layers) // 3 : -(-2 * len(layers) // 3)])
    predictable, kept = found["predictable"], found["predictable_not_removable"]
    return [
        ClaimRow(
            claim="C1",
            what=f"attention is predictable from the hidden state: R, on {model}",
            paper="0.84 or more",
            ours=f"R {estimate(overall['r'])}, of the mean alone {estimate(mean)}; "
            f"centred R² {estimate(overall['r2'])}",
            command=command,
            verdict=at_least(interval_of(overall["r"]), 0.84),
        ),
        ClaimRow(
            claim="C1",
            what=f"R of the middle third of layers, on {model}",
            paper="0.97 to 0.99",
            ours=f"{estimate(middle[0])} to {estimate(middle[-1])}",
            command=command,
            verdict=every(at_least(interval_of(layer), 0.97) for layer in middle),
        ),
        ClaimRow(
            claim="C1",
            what=f"share of heads with R above 0.8, on {model}",
            paper="0.34 (0.41 from 0.5 to 0.8, 0.25 below)",
            ours=f"{estimate(heads)} ({estimate(shares['0.5_to_0.8'])} from 0.5 to 0.8, "
            f"{estimate(shares['below_0.5'])} below)",
            command=command,
            verdict=at_least(interval_of(heads), 0.34),
        ),
        ClaimRow(
            claim="C1",
            what=f"predictable layers can do without attention, on {model}",
            paper="implied by `redundant`",
            ours=f"{len(kept)} of {len(predictable)} layers with R of {found['predictable_r']} or more cost over "
            f"{found['removable_nats']} nats when replaced by the probe, by their whole interval",
            command=command,
            verdict=Verdict.NOT_REPRODUCED if kept else Verdict.REPRODUCED if predictable else Verdict.NOT_TESTABLE,
        ),
    ]


def _training(data: dict[str, Any] | None) -> ClaimRow:
    """Row on R over training; not testable by models that never reach the first step of which the claim speaks."""
    what, paper = "R does not fall during ordinary training", "rises, 0.52 at 10K steps to 0.72 at 300K"
    command = "make audit-results"
    points = [p for p in data.get("points", ()) if p["run"].startswith("attention")] if data is not None else []
    if data is None or not points:
        return _not_run("C2", what, paper, command)
    by_run: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda p: p["step"]):
        by_run.setdefault(point["run"], []).append(point)
    last = max(p["step"] for p in points)
    courses = "; ".join(", ".join(_at(p) for p in _told(course)) for course in by_run.values())
    text = (
        f"{len(by_run)} small models of attention, {last:,} steps where the paper's claim begins at {FROM_STEP:,}; R "
        f"of all (of the mean alone): {courses}"
    )
    late = [t for t in data["trends"] if t["run"].startswith("attention") and t["from_step"] >= FROM_STEP]
    verdict = every(at_least(interval_of(t["r"]["change"]), 0.0) for t in late) if late else Verdict.NOT_TESTABLE
    return ClaimRow(claim="C2", what=what, paper=paper, ours=text, command=command, verdict=verdict)


def _told(course: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Selects the first point, the one with the highest R, the middle one after it, and the last."""
    highest = max(course, key=lambda p: p["overall"]["hidden"]["r"][0])
    late = [p for p in course if p["step"] > highest["step"]]
    told = [course[0], highest, *late[len(late) // 2 : len(late) // 2 + 1], course[-1]]
    return [p for i, p in enumerate(told) if p not in told[:i]]


def _at(point: dict[str, Any]) -> str:
    overall = point["overall"]
    return f"{overall['hidden']['r'][0]:.2f} ({overall['mean']['r'][0]:.2f}) at step {point['step']:,}"
