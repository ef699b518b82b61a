"""Seconds a token when a consolidated model decodes with a long cache, beside the original, token by token in turn.

    OMP_NUM_THREADS=1 python benchmarks/consolidated_decode.py smollm2 runs/smollm2 --text stdlib --context 8192

Refuses to time anything unless the closed patch gives the original's logits bit by bit. Seconds are those that the
process had a core for. "growing cache" is the original with the cache that the patch brings, so that the two savings
are told apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from cramlab import load as load_consolidated
from cramlab import read_report, records
from cramlab.audit import read_corpus
from cramlab.hf.consolidated import closed, installed
from cramlab.hf.consolidation_folder import read_record
from cramlab.hf.growing_cache import GrowingLayer
from cramlab.hf.loading import load
from cramlab.retrofit.learn import no_token


def plain(cache):
    """A cache as transformers makes it, with the same contents."""
    found = DynamicCache()
    for i, layer in enumerate(cache.layers):
        found.update(layer.keys.clone(), layer.values.clone(), i)
    return found


def step(model, token, cache):
    """Seconds of one token, and the next one."""
    start = time.process_time()
    logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    return time.process_time() - start, logits


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pretrained = load(args.model)
    original = copy.deepcopy(pretrained.model)  # without a patch: what a user would run
    folder = Path(args.folder)
    model = load_consolidated(pretrained.model, folder)
    encoded = (pretrained.encode(d.text[: 16 * args.context]) for d in read_corpus(args.text).documents)
    tokens = torch.tensor(next(ids for ids in encoded if len(ids) >= args.context)[: args.context])[None]
    cache = DynamicCache(config=original.config)
    with closed(model):
        short = tokens[:, : min(256, args.context)]
        if not torch.equal(model(short).logits, original(short).logits):
            raise SystemExit("parity: the closed patch is not the original; nothing is timed")
        for chunk in tokens[:, :-1].split(1024, dim=1):
            model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    caches = {"original": plain(cache), "growing cache": copy.deepcopy(cache), "consolidated": copy.deepcopy(cache),
              "no far reads": cache}  # fmt: skip
    assert all(type(layer) is GrowingLayer for layer in caches["consolidated"].layers)
    seconds = {name: [] for name in caches}
    layers, skipped = list(installed(model).values()), []
    feed = dict.fromkeys(caches, tokens[:, -1:])
    for i in range(args.tokens + 2):
        for name, held in caches.items():
            for layer in layers:
                layer.rule = no_token if name == "no far reads" else None
            if name == "growing cache":
                with closed(model):
                    took, logits = step(model, feed[name], held)
            else:
                before = read_report(model).total
                took, logits = step(original if name == "original" else model, feed[name], held)
                after = read_report(model).total
                if name == "consolidated":
                    skipped.append(1 - (after.far_reads - before.far_reads) / (after.far_tokens - before.far_tokens))
            feed[name] = logits[:, -1:].argmax(-1)
            if i >= 2:  # the first steps make room
                seconds[name].append(took)
    summary = {}
    for name, took in seconds.items():
        low, median, high = np.quantile(took, [0.1, 0.5, 0.9])
        ratio = np.quantile(np.array(seconds["original"]) / np.array(took), [0.1, 0.5, 0.9])
        summary[name] = {"seconds": [median, low, high], "faster": [ratio[1], ratio[0], ratio[2]]}
        spread = f"[{low * 1e3:.1f}, {high * 1e3:.1f}]"
        print(f"{name:>14}: {median * 1e3:7.1f} ms {spread}, {ratio[1]:.2f}x [{ratio[0]:.2f}, {ratio[2]:.2f}] faster")
    print(json.dumps({
        "header": records.header(torch.device("cpu")), "context": args.context, "tokens": args.tokens,
        "skipped_frac": float(np.mean(skipped)), "promise": read_record(folder)["promise"], "steps": summary,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
