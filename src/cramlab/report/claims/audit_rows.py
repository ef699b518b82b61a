"""C1 and C2: is attention of pretrained models redundant, and does it become less so?"""

from __future__ import annotations

from typing import Any

from cramlab.report.claims.evidence import ClaimRow, Evidence, Verdict, estimate


def rows(evidence: Evidence) -> list[ClaimRow]:
    """Of the audits."""
    made = [
        ClaimRow(
            claim="C1",
            what="R of GPT-2, 124M and 355M",
            paper=".84 and .92, mean .88",
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
                ".84 or more",
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
    layers = [r[0] for r in data["probes"]["hidden"]["layers"]["r"]]
    middle = layers[len(layers) // 3 : -(-2 * len(layers) // 3)]
    predictable, kept = found["predictable"], found["predictable_not_removable"]
    high = overall["r"][2] if overall["r"][2] is not None else overall["r"][0]
    top = heads[2] if heads[2] is not None else heads[0]
    return [
        ClaimRow(
            claim="C1",
            what=f"attention is predictable from the hidden state: R, on {model}",
            paper=".84 or more",
            ours=f"R {estimate(overall['r'])}, of the mean alone {estimate(mean)}; "
            f"centred R² {estimate(overall['r2'])}",
            command=command,
            verdict=Verdict.REPRODUCED if high >= 0.84 else Verdict.NOT_REPRODUCED,
        ),
        ClaimRow(
            claim="C1",
            what=f"R of the middle third of layers, on {model}",
            paper=".97 to .99",
            ours=f"{min(middle):.2f} to {max(middle):.2f}",
            command=command,
            verdict=Verdict.REPRODUCED if max(middle) >= 0.97 else Verdict.NOT_REPRODUCED,
        ),
        ClaimRow(
            claim="C1",
            what=f"share of heads with R above .8, on {model}",
            paper=".34 (.41 from .5 to .8, .25 below)",
            ours=f"{estimate(heads)} ({estimate(shares['0.5_to_0.8'])} from .5 to .8, "
            f"{estimate(shares['below_0.5'])} below)",
            command=command,
            verdict=Verdict.REPRODUCED if top >= 0.34 else Verdict.NOT_REPRODUCED,
        ),
        ClaimRow(
            claim="C1",
            what=f"predictable layers can do without attention, on {model}",
            paper="implied by `redundant`",
            ours=f"{len(kept)} of {len(predictable)} layers with R of {found['predictable_r']} or more cost over "
            f"{found['removable_nats']} nats when replaced by the probe",
            command=command,
            verdict=Verdict.NOT_REPRODUCED if kept else Verdict.REPRODUCED if predictable else Verdict.NOT_TESTABLE,
        ),
    ]


def _training(data: dict[str, Any] | None) -> ClaimRow:
    what, paper = "R does not fall during ordinary training", "rises, .52 at 10K steps to .72 at 300K"
    command = "make audit-results"
    if data is None:
        return _not_run("C2", what, paper, command)
    plain = [trend for trend in data["trends"] if trend["run"].startswith("attention")]
    if not plain:
        return _not_run("C2", what, paper, command)
    falls = sum(trend["r"]["direction"] == "falls" for trend in plain)
    changes = "; ".join(f"{estimate(t['r']['change'])}, centred R² {estimate(t['r2']['change'])}" for t in plain)
    last = max(trend["to_step"] for trend in plain)
    return ClaimRow(
        claim="C2",
        what=what,
        paper=paper,
        ours=f"falls in {falls} of {len(plain)} small models of attention over {last:,} steps (change of R {changes}); "
        "the paper's range of steps is out of reach here",
        command=command,
        verdict=Verdict.NOT_REPRODUCED if falls else Verdict.REPRODUCED,
    )
