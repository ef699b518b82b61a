"""Times a consolidated model on a prompt and on a token with a long cache, beside the original and baselines.

    OMP_NUM_THREADS=1 python -m benchmarks.consolidated_decode smollm2 runs/smollm2 --text stdlib --context 8192 \
        --out results/consolidate/smollm2/decode-8192.json

All ways take turns, prompt by prompt and token by token. Nothing is timed unless the closed patch gives the original's
logits bit by bit. Times are CPU times of the process. "growing cache" is the original with the
cache that the patch brings, which separates the two savings; all ways below it have that cache as well. Static
baselines leave out the share of far reads that the folder's threshold was made for; which layers they leave out does
not change their time, and neither do the numbers in a linear map, so these are not learned.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache

from benchmarks import timing
from cramlab import load_consolidated, records, skip_counts
from cramlab.auditing import read_corpus
from cramlab.consolidation.compare import sublayers
from cramlab.consolidation.folder import load_layers, load_record
from cramlab.consolidation.patch.growing_cache import GrowingLayer
from cramlab.consolidation.patch.install import closed, consolidatable_sites, install
from cramlab.consolidation.rules import baselines
from cramlab.files import write_json
from cramlab.hf.loading import load


class Ways:
    """The original and the models compared with it, by name; all share their weights.

    Args:
        model: the original.
        folder: of its consolidation.
        tokens: to choose heads on, (T,).
    """

    def __init__(self, model, folder, tokens) -> None:
        self.model, self.folder, self.tokens = model, folder, tokens
        self.record = load_record(folder)
        self.near = self.record["window"], self.record["n_sinks"]
        self.contexts = contextlib.ExitStack()  # patches that stay closed, sub-layers that stay replaced

    def made(self):
        """One model a way."""
        return {
            "original": self.twin(), "growing cache": self.closed(), "consolidated": self.consolidated(),
            "no far reads": self.layers(1.0), "window everywhere, no adapters": self.heads(1.0),
            "whole layers": self.layers(), "whole heads, no adapters": self.heads(),
            "sub-layers dropped": self.without(), "sub-layers linear": self.without(linear=True),
        }  # fmt: skip

    def twin(self):
        """Another model with the same weights."""
        return copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})

    def consolidated(self):
        """With its patch."""
        return load_consolidated(self.twin(), self.folder)

    def closed(self):
        """With its patch closed: the growing cache is what is left of it."""
        model = self.consolidated()
        self.contexts.enter_context(closed(model))
        return model

    def some(self, n, frac):
        """Number of n that are left out at the folder's share."""
        return round((self.record["skipped_frac"] if frac is None else frac) * n)

    def layers(self, frac=None):
        """Whole layers without far reads, with their adapters."""
        model = self.twin()
        _, learned = load_layers(model, self.folder)
        without = sorted(learned)[: self.some(len(learned), frac)]
        install(model, baselines.some_layers(learned, without))
        return model

    def heads(self, frac=None):
        """Whole heads without far reads, those whose far reads are worth least."""
        model = self.twin()
        sites = consolidatable_sites(model)
        sensitivity = self.record["learned"]["sensitivity"]
        importance = baselines.head_importance(model, sites, sensitivity, [self.tokens], *self.near)
        share = self.some(importance.numel(), frac) / importance.numel()
        install(model, baselines.static_heads(sites, importance, share, *self.near))
        return model

    def without(self, *, linear=False):
        """Without whole sub-layers."""
        model = self.closed()
        sites = consolidatable_sites(model)
        others = {
            i: sublayers.Instead(nn.Linear(sites[i].d_model, sites[i].d_model) if linear else None)
            for i in range(len(sites) - self.some(len(sites), None), len(sites))
        }
        self.contexts.enter_context(sublayers.replaced(model, sites, others))
        return model


class Decoding:
    """Decodes one more token at every call.

    Args:
        model: that decodes.
        cache: of all tokens before.
        token: the newest, (1, 1).
        place: its position.
    """

    def __init__(self, model, cache, token, place) -> None:
        self.model, self.cache, self.token, self.place = model, cache, token, place

    def __call__(self) -> None:
        """Passes positions, because a first layer without attention has no keys from which they could be counted."""
        place = torch.tensor([[self.place]])
        logits = self.model(input_ids=self.token, position_ids=place, past_key_values=self.cache, use_cache=True).logits
        self.token, self.place = logits[:, -1:].argmax(-1), self.place + 1


def plain(cache):
    """A cache as transformers makes it, with the same contents."""
    found = DynamicCache()
    for i, layer in enumerate(cache.layers):
        found.update(layer.keys.clone(), layer.values.clone(), i)
    return found


def prefilled(model, tokens):
    """The cache of a prompt (1, T)."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def held(model, tokens):
    """Computes `prefilled` in parts, since a long prompt's scores would need much memory."""
    cache = DynamicCache(config=model.config)
    for part in tokens.split(1024, dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def skipped_frac(before, after):
    """Share of the far reads between two counts that were left out; None where nothing was far."""
    far = after.far_tokens - before.far_tokens
    return 1 - (after.far_reads - before.far_reads) / far if far else None


def main() -> None:
    """Runs what the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=8192, help="tokens in the cache when decoding")
    parser.add_argument("--tokens", type=int, default=24, help="to decode")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--prompts", type=int, default=3, help="how often the prompt is taken; 0: not at all")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pretrained, longest = load(args.model), max(args.context, args.prompt)
    encoded = (pretrained.encode(d.text[: 16 * longest]) for d in read_corpus(args.text).documents)
    tokens = torch.tensor(next(ids for ids in encoded if len(ids) >= longest)[:longest])[None]
    prompt, tokens = tokens[:, : args.prompt], tokens[:, : args.context]
    models = Ways(pretrained.model, args.folder, prompt[0]).made()
    short = tokens[:, :256]
    if not torch.equal(models["growing cache"](short).logits, models["original"](short).logits):
        raise SystemExit("parity: the closed patch is not the original; nothing is timed")

    cache = held(models["growing cache"], tokens[:, :-1])
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    caches = {name: plain(cache) if name == "original" else copy.deepcopy(cache) for name in models}
    steps = {name: Decoding(model, caches[name], tokens[:, -1:], args.context - 1) for name, model in models.items()}
    before = skip_counts(models["consolidated"]).total
    decode = timing.side_by_side(steps, repeats=args.tokens, warmups=2)  # the first steps allocate
    between = skip_counts(models["consolidated"]).total
    del steps, caches, cache
    data = {
        "kind": "decoding",
        "header": records.header(torch.device("cpu")), "promise": load_record(args.folder)["promise"],
        "decode": {"context": args.context, "skipped_frac": skipped_frac(before, between), "ways": decode},
    }  # fmt: skip
    if args.prompts:
        prompts = {name: functools.partial(prefilled, model, prompt) for name, model in models.items()}
        ways = timing.side_by_side(prompts, repeats=args.prompts, warmups=0)
        skipped = skipped_frac(between, skip_counts(models["consolidated"]).total)
        data["prompt"] = {"context": args.prompt, "skipped_frac": skipped, "ways": ways}
    for what in ("decode", "prompt"):
        for name, way in data.get(what, {"ways": {}})["ways"].items():
            spread = "{median:,.2f} ms [{p10:,.2f}, {p90:,.2f}]".format(**way["ms"])
            print(f"{what}, {name}: {spread}, {way['speedup']['median']:.2f} times as fast")
    write_json(args.out, data)


if __name__ == "__main__":
    main()
