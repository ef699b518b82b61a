r"""A guard over a stream that turns from one text to another and back, with a consolidated model.

    cramlab consolidate glassllm --text stdlib --max-loss-increase 0.05 --out runs/glass --set context=128 \
        --set window=16 --set test_documents=160
    python -m reproduction.protocols.drift_text glassllm runs/glass --text stdlib --turn prose \
        --out results/drift/glassllm.json

Audits are real: on every rung of the ladder each document is audited, and some of its tokens. Streams draw from them
with replacement, so that hundreds of streams of two million tokens take a minute. Documents of the first text are those
that the folder was tested on; those that it was calibrated on are the guard's reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cramlab import records
from cramlab.betting import Watch, highest_mean
from cramlab.consolidation.audits import Pass, changes_of, document_increase, token_change
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.documents import held_out_of
from cramlab.consolidation.earlier import config_before
from cramlab.consolidation.folder import load_record, skip_counts
from cramlab.consolidation.guarantee import Guarantee
from cramlab.consolidation.guard import CAP
from cramlab.consolidation.ladder import Rung, ladder_of
from cramlab.consolidation.patch.install import installed
from cramlab.files import write_json
from cramlab.hf.loading import Pretrained
from cramlab.pretrained import load_consolidated, load_pretrained
from cramlab.text.sources import corpus_of
from reproduction.protocols.drift_cost import ALPHA, AUDIT_FRAC, cost, documents

PHASES = (("before", 0, 500_000), ("turned", 1, 1_000_000), ("back", 0, 500_000))  # name, text, tokens
TOKENS_PER_DOCUMENT = 8


def audited(model: nn.Module, documents: Sequence[Tensor], rung: Rung, near: int, seed: int) -> dict[str, Any]:
    """Increase of each document, (N,), and change of some of its tokens, (N, tokens), on one rung; share skipped.

    Tokens are drawn among those that have far keys.
    """
    for layer in installed(model).values():
        layer.threshold = rung.threshold  # type: ignore[assignment]
        layer.tally.reset()
    generator = torch.Generator().manual_seed(seed)
    increases, changes, skipped = [], [], []
    for tokens in documents:
        before = skip_counts(model).total
        output = model(input_ids=tokens[None], past_key_values=DynamicCache(), use_cache=True)
        after = skip_counts(model).total
        skipped.append((after.far_reads - before.far_reads, after.far_tokens - before.far_tokens))
        seen = Pass(tokens[None], output.logits, 0, output.past_key_values, {})
        increases.append(document_increase(model, seen, 0))
        places = near + torch.randperm(len(tokens) - near, generator=generator)[:TOKENS_PER_DOCUMENT]
        changes.append([token_change(model, seen, 0, int(t)) for t in places])
    made, far = np.array(skipped, dtype=np.float64).sum(axis=0)
    return {"increases": np.array(increases), "changes": np.array(changes), "skipped": float(1 - made / far)}


def stream(
    found: list[list[dict[str, Any]]], promise: Guarantee, bound: float, context: int, far: float, seed: int
) -> dict[str, Any]:
    """One stream under a guard.

    Args:
        found: from `audited`, by rung and text.
        promise: guarantee of the folder.
        bound: bound of the change of a token, nats.
        context: tokens of a document.
        far: share of tokens that have far keys; the others are not audited.
        seed: seed of the stream.

    Returns:
        By phase: rung at its end, mean increase of documents and share of far reads skipped over the phase, and tokens
        from its start to its first alarm (None: none).
    """
    generator = np.random.default_rng(seed)
    n_rungs = len(found)
    alpha = ALPHA / 2 / (2 * n_rungs)
    rung, out, watches = 0, {}, fresh(alpha, promise, bound)
    for name, text, n_tokens in PHASES:
        first, now, spent = None, 0, np.zeros(n_rungs + 1)  # tokens of the phase on each rung
        n_documents, n_single = generator.binomial([n_tokens // context, round(far * n_tokens)], AUDIT_FRAC)
        events = [(int(at), "documents") for at in generator.integers(n_tokens, size=n_documents)]
        events += [(int(at), "tokens") for at in generator.integers(n_tokens, size=n_single)]
        for at, watched in sorted(events):
            spent[rung] += at - now
            now = at
            if rung == n_rungs:
                continue
            audits = found[rung][text]
            if watched == "documents":
                outcome = float(promise.unit(generator.choice(audits["increases"])))
            else:
                outcome = min(CAP, float(generator.choice(audits["changes"].ravel()))) / CAP
            watches[watched].update(outcome)
            if watches[watched].alarms[0]:
                first = at if first is None else first
                rung, watches = rung + 1, fresh(alpha, promise, bound)
        spent[rung] += n_tokens - now
        share = spent / n_tokens
        means = [float(by_text[text]["increases"].mean()) for by_text in found] + [0.0]
        skipped = [by_text[text]["skipped"] for by_text in found] + [0.0]
        out[name] = {"rung": rung, "increase": float(share @ means), "skipped": float(share @ skipped), "alarm": first}
    return out


def fresh(alpha: float, promise: Guarantee, bound: float) -> dict[str, Watch]:
    """What a guard watches on a rung."""
    return {"documents": Watch(alpha, float(promise.unit(promise.increase))), "tokens": Watch(alpha, bound / CAP)}


def summary(streams: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over streams, by phase."""
    rows = {}
    for name, _, _ in PHASES:
        phase = [one[name] for one in streams]
        late = sorted(row["alarm"] for row in phase if row["alarm"] is not None)
        rows[name] = {
            "streams_with_alarm": len(late),
            "median_tokens_to_alarm": None if not late else float(np.median(late)),
            "mean_rung": float(np.mean([row["rung"] for row in phase])),
            "increase": float(np.mean([row["increase"] for row in phase])),
            "skipped_frac": float(np.mean([row["skipped"] for row in phase])),
        }
    return rows


def texts(
    pretrained: Pretrained, config: ConsolidationConfig, text: str, turn: str, most: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Reference documents, documents of the stream before the turn, and documents of the other text."""
    parts = held_out_of(pretrained, corpus_of(text), config)
    other = documents(pretrained, turn, config.context, most, config.seed)
    return parts["calibration"], parts["test"][:most], other


def main(given: Sequence[str] | None = None) -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="folder of a consolidation")
    parser.add_argument("--text", required=True, help="text that the folder was made for")
    parser.add_argument("--turn", required=True, help="text that the stream turns to")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=160, metavar="N", help="documents of each text, at most")
    parser.add_argument("--streams", type=int, default=200, metavar="N")
    args = parser.parse_args(given)
    record = load_record(args.folder)
    config = config_before(record, args.folder)
    pretrained = load_pretrained(args.model)
    reference, own, other = texts(pretrained, config, args.text, args.turn, args.documents)
    model, promise = load_consolidated(pretrained, args.folder), Guarantee(**record["promise"])
    rungs, near = ladder_of(record)[:-1], record["window"] + record["n_sinks"]
    with torch.inference_mode():
        changes = changes_of(model, reference, tokens_per_document=4, cap=CAP, seed=0)
        bound = CAP * highest_mean(np.array(changes) / CAP, ALPHA / 2)
        found = [[audited(model, docs, rung, near, 0) for docs in (own, other)] for rung in rungs]
        timed = cost(model, reference, own[0], near + 1)
    far = 1 - near / config.context
    streams = [stream(found, promise, bound, config.context, far, seed) for seed in range(args.streams)]
    rows = [
        {"skipped_asked": rung.skipped_frac, "text": name, "documents": len(audits["increases"]),
         "increase": float(audits["increases"].mean()), "skipped_frac": audits["skipped"],
         "change": float(np.minimum(audits["changes"], CAP).mean())}
        for rung, by_text in zip(rungs, found, strict=True)
        for name, audits in zip((args.text, args.turn), by_text, strict=True)
    ]  # fmt: skip
    header = records.header(torch.device("cpu")) | {"kind": "stale text", "model": record["name"]}
    setting = {"alpha": ALPHA, "audit_frac": AUDIT_FRAC, "phases": [list(phase) for phase in PHASES],
               "text": args.text, "turn": args.turn, "promise": record["promise"], "change_bound": bound,
               "context": config.context, "streams": args.streams}  # fmt: skip
    write_json(args.out, header | {"setting": setting, "rungs": rows, "phases": summary(streams), "cost": timed})
    print(setting, *rows, summary(streams), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
