"""Loss against far reads skipped: consolidation, its oracle and the baselines, on the test documents of one text.

Works in the folder of `cramlab consolidate`, before it: what is learned is learned once, and `cramlab consolidate` with
the same --out, the same --set and --resume goes on from there. Rows are written as they come; a row that is there is
kept. Example:

    python tools/compare_consolidation.py smollm2 --text stdlib --set context=2048 --out runs/smollm2 --documents 8
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cramlab import records
from cramlab.audit import read_corpus
from cramlab.audit.resume import Stages, identity
from cramlab.config import override, to_dict
from cramlab.files import write_json
from cramlab.hf.consolidated import consolidatable_sites, patched
from cramlab.hf.loading import load
from cramlab.retrofit import baselines
from cramlab.retrofit.config import PARTS, RetrofitConfig
from cramlab.retrofit.consolidate import Calibration
from cramlab.retrofit.learn import Learner
from cramlab.retrofit.measure import measured, original_loss, set_threshold
from cramlab.retrofit.text import parts_of

FRACS = (0.5, 0.75, 0.9, 1.0)
FILE = "comparison.json"


class Rules:
    """Every rule by name, made only when its turn comes."""

    def __init__(self, model, sites, config, parts, stages) -> None:
        self.model, self.sites, self.config, self.parts = model, sites, config, parts
        self.near = (config.window, config.n_sinks)
        self.learner = Learner(model, sites, config, parts, stages)
        self.learned = self.learner.learn()
        self.calibration = Calibration(model, sites, config, parts, stages, self.learned)
        self.thresholds = dict(zip(config.skipped_fracs, self.calibration.thresholds(), strict=True))
        self.few = parts["validation"][:3]  # importances and the oracle's thresholds come from these

    def rows(self) -> Iterator[tuple[str, float, Callable[[], baselines.Layers]]]:
        """Name, share to skip, layers."""
        for frac in FRACS:
            yield "gate", frac, lambda frac=frac: self.gate(frac)
        yield "window", 1.0, lambda: baselines.static_window(self.sites, *self.near)
        for frac in (0.75, 0.9):
            yield "oracle", frac, lambda frac=frac: self.oracle(frac)
            yield "random", frac, lambda frac=frac: baselines.by_chance(self.learned.layers, frac, self.config.seed)
            yield "layers", frac, lambda frac=frac: self.layers(frac)
            yield "heads", frac, lambda frac=frac: self.heads(frac)
        for frac in (0.25, 0.5):
            yield "dropped", frac, lambda frac=frac: self.dropped(frac, linear=False)
            yield "linear", frac, lambda frac=frac: self.dropped(frac, linear=True)
        yield "benefit gate", 0.75, lambda: self.benefit(0.75)
        yield "gate, no adapters", 0.75, lambda: self.without_adapters(0.75)

    def gate(self, frac: float) -> baselines.Layers:
        """Ours."""
        set_threshold(self.learned.layers, self.thresholds[frac])
        return self.learned.layers

    def without_adapters(self, frac: float) -> baselines.Layers:
        """Ours, answering with the window alone where nothing is read."""
        layers = baselines.static_window(self.sites, *self.near)
        for i, layer in layers.items():
            layer.gate, layer.rule, layer.threshold = self.learned.layers[i].gate, None, self.thresholds[frac]
        return layers

    def benefit(self, frac: float) -> baselines.Layers:
        """Gates that regress the counterfactual benefit itself; their own threshold, from validation."""
        layers = copy.deepcopy(self.learned.layers)
        for site, probe in zip(self.sites, self.learned.benefit_gates, strict=True):
            layers[site.layer].gate.weight.data.copy_(probe.weight.T)
            layers[site.layer].gate.bias.data.copy_(probe.bias)
        learned = dataclasses.replace(self.learned, layers=layers)
        stages, few = Stages(None, "", None), {"validation": self.few}
        thresholds = Calibration(self.model, self.sites, self.config, few, stages, learned).thresholds()
        set_threshold(layers, thresholds[self.config.skipped_fracs.index(frac)])
        return layers

    def oracle(self, frac: float) -> baselines.Layers:
        """Knows the error of every skip."""
        seen: list[torch.Tensor] = []
        make = lambda threshold, seen=None: baselines.oracle(  # noqa: E731
            self.sites, self.learned.layers, self.learned.sensitivity, *self.near, threshold, seen
        )
        for tokens in self.few:
            with patched(self.model, make(-torch.inf, seen)):
                self.model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
        return make(float(torch.cat(seen).sort().values[int(frac * sum(map(len, seen)))]))

    def layers(self, frac: float) -> baselines.Layers:
        """The layers whose far reads are worth least, by sensitivity times the error that is left."""
        left = torch.tensor(self.learned.sensitivity) * torch.tensor(self.errors())
        which = left.argsort()[: round(frac * len(self.sites))].tolist()
        return baselines.some_layers(self.learned.layers, [self.sites[i].layer for i in which])

    def errors(self) -> list[float]:
        """Mean squared error of each adapter on validation documents."""
        return self.learner.errors("validation-gate", self.learned.layers).mean("error").tolist()

    def heads(self, frac: float) -> baselines.Layers:
        """Whole heads."""
        importance = baselines.head_importance(self.model, self.sites, self.learned.sensitivity, self.few, *self.near)
        return baselines.static_heads(self.sites, importance, frac, *self.near)

    def dropped(self, frac: float, *, linear: bool) -> baselines.Layers:
        """Whole sub-layers."""
        importance = baselines.cosine_importance(self.model, self.sites, self.few)
        which = importance.argsort()[: round(frac * len(self.sites))].tolist()
        maps = None
        if linear:
            fit, held_out = (self.learner.moments(part) for part in ("fit", "validation"))
            maps = baselines.linear_maps(self.sites, fit.moments, held_out.moments, self.config.strengths)
        return baselines.dropped(self.sites, which, *self.near, maps)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--documents", type=int, default=8, help="test documents, at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    config = RetrofitConfig()
    for assignment in args.overrides:
        config = override(config, assignment)
    pretrained, corpus = load(args.model), read_corpus(args.text)
    parts = parts_of(pretrained, corpus, config)
    sites = consolidatable_sites(pretrained.model)
    stages = Stages(args.out / "state", identity(pretrained.model, [parts[p] for p in PARTS], config), None)
    rules = Rules(pretrained.model, sites, config, parts, stages)
    documents = parts["test"][: args.documents]
    path = args.out / FILE
    data = json.loads(path.read_text()) if path.exists() else {
        "header": records.header(torch.device("cpu")), "name": pretrained.name, "note": pretrained.note,
        "text": corpus.described(), "config": to_dict(config), "documents": len(documents),
        "original": [original_loss(pretrained.model, tokens) for tokens in documents],
        "ranks": rules.learned.ranks, "explained": rules.learned.explained, "sensitivity": rules.learned.sensitivity,
        "rows": [],
    }  # fmt: skip
    have = {(row["rule"], row["asked"]) for row in data["rows"]}
    for name, frac, make in rules.rows():
        if (name, frac) in have:
            continue
        start = time.perf_counter()
        layers = make()
        found = [measured(pretrained.model, tokens, layers) for tokens in documents]
        data["rows"].append({
            "rule": name, "asked": frac,
            "increase": [one.loss - before for one, before in zip(found, data["original"], strict=True)],
            "skipped_frac": [one.skipped_frac for one in found], "pairs_frac": [one.pairs_frac for one in found],
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        write_json(path, data)
        mean = sum(data["rows"][-1]["increase"]) / len(found)
        skipped = sum(one.skipped_frac for one in found) / len(found)
        print(time.strftime("%H:%M:%S"), name, frac, f"skipped {skipped:.3f} increase {mean:+.4f}", flush=True)


if __name__ == "__main__":
    main()
