"""What watching costs while a consolidated model decodes.

    cramlab consolidate smollm2 --text stdlib --out runs/smollm2
    python -m reproduction.protocols.drift_cost smollm2 runs/smollm2 --text stdlib --out results/drift/cost-smollm2.json

Each token of one document is decoded, looked at by a guard, and audited, each timed apart; what a guard adds is a look
at every token and an audit of one in 500. How well the folder was consolidated does not matter here. A minute on one
core for a model of 135 M parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cramlab import records
from cramlab.consolidation.audits import seen_pass, token_change
from cramlab.consolidation.documents import order_of
from cramlab.consolidation.earlier import config_before
from cramlab.consolidation.folder import load_record
from cramlab.consolidation.guard import Guard
from cramlab.files import write_json
from cramlab.hf.loading import Pretrained
from cramlab.pretrained import load_consolidated, load_pretrained
from cramlab.text.sources import corpus_of

ALPHA, AUDIT_FRAC = 0.05, 0.002


def cost(model: nn.Module, reference: Sequence[Tensor], document: Tensor, n_prompt: int) -> dict[str, float]:
    """Time that a guard adds to decoding a document after a prompt, as a share; medians over its tokens.

    Args:
        model: the consolidated model.
        reference: documents, (T,) each.
        document: token ids, (T,).
        n_prompt: number of tokens before the first timed one.
    """
    guard = Guard(model, alpha=ALPHA, audit_frac=1e-9, reference=reference)  # audits are timed apart
    guard.remove()
    tokens, cache = document[None], DynamicCache()
    model(input_ids=tokens[:, :n_prompt], past_key_values=cache, use_cache=True)
    passes, looks, audits = [], [], []
    for t in range(n_prompt, len(document)):
        given = {"input_ids": tokens[:, t : t + 1], "past_key_values": cache, "use_cache": True}
        begin = time.perf_counter()
        output = model(**given)
        passed = time.perf_counter()
        guard.look((), given, output)
        looked = time.perf_counter()
        seen = seen_pass(given, output)
        assert seen is not None
        token_change(model, seen, 0)
        passes.append(passed - begin)
        looks.append(looked - passed)
        audits.append(time.perf_counter() - looked)
    one, look, audit = map(statistics.median, (passes, looks, audits))
    return {"pass_ms": one * 1e3, "look_ms": look * 1e3, "audit_ms": audit * 1e3,
            "share": (look + AUDIT_FRAC * audit) / one}  # fmt: skip


def documents(pretrained: Pretrained, text: str, context: int, n: int, seed: int) -> list[Tensor]:
    """The first documents of a text, (context,) each, that are long enough."""
    found, corpus = [], corpus_of(text)
    for i in order_of(corpus, seed):
        tokens = torch.tensor(pretrained.encode(corpus.documents[i].text[: 16 * context])[:context])
        if len(tokens) == context:
            found.append(tokens)
        if len(found) == n:
            break
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="folder of a consolidation")
    parser.add_argument("--text", required=True, help="text that is decoded")
    parser.add_argument("--documents", type=int, default=24, metavar="N", help="reference documents (default: 24)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    record = load_record(args.folder)
    config, near = config_before(record, args.folder), record["window"] + record["n_sinks"]
    pretrained = load_pretrained(args.model)
    decoded, *reference = documents(pretrained, args.text, config.context, args.documents + 1, config.seed)
    model = load_consolidated(pretrained, args.folder)
    with torch.inference_mode():
        timed = cost(model, reference, decoded, near + 1)
    header: dict[str, Any] = records.header(torch.device("cpu")) | {"kind": "cost of a guard", "model": record["name"]}
    setting = {"alpha": ALPHA, "audit_frac": AUDIT_FRAC, "context": config.context, "from": near + 1,
               "parameters": sum(p.numel() for p in pretrained.model.parameters())}  # fmt: skip
    write_json(args.out, header | {"setting": setting, "cost": timed})
    print(setting, timed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
