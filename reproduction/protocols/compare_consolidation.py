r"""Loss against far reads skipped: consolidation, its oracle and the baselines, on documents that nothing learned from.

Works in the folder of `cramlab consolidate`, before it: what is learned is learned once, and `cramlab consolidate` with
the same --out, texts and --set and with --resume goes on from there. Rows are written as they come; a row that is there
is kept. `comparison.json` has the test documents, `comparison-TEXT-CONTEXT.json` other lengths (documents from test and
calibration that are long enough) and another text (its documents end to end, cut). Thresholds are those of the
validation documents everywhere. With `--from` nothing is learned: what a folder of `cramlab consolidate` holds is
measured, beside the rules that need no learning by gradients. Example:

    python -m reproduction.protocols.compare_consolidation smollm2 --text stdlib --set context=2048 \\
        --out runs/smollm2 --documents 8
    python -m reproduction.protocols.compare_consolidation smollm2 --text stdlib --from runs/less --contexts 1024 \\
        --out runs/elsewhere
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cramlab import records
from cramlab.auditing import read_corpus
from cramlab.auditing.resume import Stages, identity
from cramlab.config import overridden, to_dict
from cramlab.consolidation import baselines
from cramlab.consolidation.attention import ConsolidatedAttention
from cramlab.consolidation.closed_form import Learner, set_gate
from cramlab.consolidation.config import GROUPS, RetrofitConfig
from cramlab.consolidation.documents import held_out_at, parts_of, running_contexts
from cramlab.consolidation.earlier import config_before, learned_before
from cramlab.consolidation.folder import read_record
from cramlab.consolidation.gradients import distilled
from cramlab.consolidation.install import consolidatable_sites
from cramlab.consolidation.lora import lora
from cramlab.consolidation.measure import DocumentLoss, at_threshold, measured, original_loss
from cramlab.consolidation.pipeline import (
    CLOSED_FORM,
    Calibration,
    chosen_by_validation,
    gradients,
    learn,
)
from cramlab.consolidation.recovery import recovered
from cramlab.files import write_json
from cramlab.hf.loading import load

FRACS = (0.5, 0.75, 0.9, 0.92, 1.0)
Measure = Callable[[torch.Tensor], DocumentLoss]
RECOVERED = (0.75, 0.9)  # shares that LoRA learns to make good


class Rules:
    """Every rule by name, made only when its turn comes."""

    def __init__(self, model, sites, config, parts, stages, args, saved=None) -> None:
        self.model, self.sites, self.config, self.parts, self.stages = model, sites, config, parts, stages
        self.near = (config.window, config.n_sinks)
        self.learner = Learner(model, sites, config, parts, stages)
        self.router_steps, self.lora_steps, self.lora_rank = args.router_steps, args.lora_steps, args.lora_rank
        self.saved = saved is not None
        if saved is not None:
            record, self.learned = saved
            self.gradients, self.chosen, self.candidates = record["gradients"], "saved", {"saved": self.learned}
        else:
            self.candidates = learn(model, sites, config, parts, stages)
            self.chosen, found = chosen_by_validation(model, sites, config, parts, stages, self.candidates)
            self.gradients = gradients(self.candidates, self.chosen, found)
            self.closed, self.learned = self.candidates[CLOSED_FORM], self.candidates[self.chosen]
        self.few = parts["validation"][:3]  # importances and the oracle's thresholds come from these

    def rows(self, *, everywhere: bool) -> Iterator[tuple[str, float, Callable[[], Measure]]]:
        """Name, share to skip, what measures a document; for other places without what says how ours came about."""
        for frac in FRACS:
            yield "gate", frac, lambda frac=frac: self.gate("", frac)
        yield "window", 1.0, lambda: self.with_patches(baselines.static_window(self.sites, *self.near))
        for frac in (0.75, 0.9):
            yield "layers", frac, lambda frac=frac: self.layers(frac)
            yield "heads", frac, lambda frac=frac: self.heads(frac)
            yield "random", frac, lambda frac=frac: self.random(frac)
            yield "oracle", frac, lambda frac=frac: self.oracle(frac)
            if self.router_steps:
                yield "router only", frac, lambda frac=frac: self.gate("router-only", frac)
            if self.lora_steps:
                yield "lora", frac, lambda frac=frac: self.gate("lora", frac)
        for frac in (0.25, 0.5, 0.75):
            yield "dropped", frac, lambda frac=frac: self.dropped(frac, linear=False)
            yield "linear", frac, lambda frac=frac: self.dropped(frac, linear=True)
        if everywhere or self.saved:
            return
        for name in (CLOSED_FORM, "local", "end"):
            if name in self.candidates and name != self.chosen:
                for frac in (0.75, 0.9):
                    yield name, frac, lambda name=name, frac=frac: self.gate(name, frac)
        yield "benefit gate", 0.75, lambda: self.benefit(0.75)
        yield "gate, no adapters", 0.75, lambda: self.without_adapters(0.75)

    def around(self, name: str) -> contextlib.AbstractContextManager:
        """Open while a rule is made and measured: with LoRA the backbone is another, with all others it is itself."""
        if name != "lora":
            return contextlib.nullcontext()
        if name not in self.candidates:
            thresholds = [self.threshold(self.chosen, frac) for frac in RECOVERED]
            with torch.enable_grad():
                self.lora, losses = recovered(
                    self.model, self.config, self.parts, self.stages, self.learned, thresholds,
                    rank=self.lora_rank, n_steps=self.lora_steps,
                )  # fmt: skip
            self.candidates[name] = self.learned
            self.gradients["losses"][name] = [float(part.mean()) for part in torch.tensor(losses).chunk(20)]
        return lora(self.model, self.lora_rank, self.config.seed, self.lora)

    def with_patches(self, layers: baselines.Layers) -> Measure:
        """Measures with these patches in place."""
        return lambda tokens: measured(self.model, tokens, layers)

    def random(self, frac: float) -> Measure:
        """Who reads is drawn by chance."""
        return self.with_patches(baselines.by_chance(self.learned.layers, frac, self.config.seed))

    def gate(self, name: str, frac: float) -> Measure:
        """What was learned last, or under that name, at its own threshold for that share."""
        if name == "router-only" and name not in self.candidates:
            self.candidates[name] = distilled(self.model, self.sites, self.config, self.parts, self.stages, self.closed,
                                              name, self.router_steps)  # fmt: skip
        threshold = self.threshold(name or self.chosen, frac)
        return self.with_patches(at_threshold(self.candidates[name or self.chosen].layers, threshold))

    def threshold(self, name: str, frac: float) -> float:
        """From the validation documents."""
        run = Calibration(self.model, self.sites, self.config, self.parts, self.stages, self.candidates[name], name)
        return run.thresholds()[self.config.skipped_fracs.index(frac)]

    def without_adapters(self, frac: float) -> Measure:
        """Ours, answering with the window alone where nothing is read."""
        layers = copy.deepcopy(self.learned.layers)
        for layer in layers.values():
            (layer.constant if layer.up is None else layer.up.weight).data.zero_()
            if layer.up is not None:
                layer.up.bias.data.zero_()
        return self.with_patches(at_threshold(layers, self.threshold(self.chosen, frac)))

    def benefit(self, frac: float) -> Measure:
        """Linear gates that regress the counterfactual benefit itself; their own threshold, from validation."""
        layers = copy.deepcopy(self.closed.layers)
        for site, probe in zip(self.sites, self.closed.benefit_gates, strict=True):
            set_gate(layers[site.layer], probe)
        learned = dataclasses.replace(self.closed, layers=layers)
        stages, few = Stages(None, "", None), {"validation": self.few}
        thresholds = Calibration(self.model, self.sites, self.config, few, stages, learned, "few").thresholds()
        return self.with_patches(at_threshold(layers, thresholds[self.config.skipped_fracs.index(frac)]))

    def oracle(self, frac: float) -> Measure:
        """Knows the error of every skip."""
        known = self.sites, self.learned.layers, self.learned.sensitivity
        threshold = baselines.oracle_threshold(self.model, *known, self.few, frac)
        return self.with_patches(baselines.oracle(*known, threshold))

    def layers(self, frac: float) -> Measure:
        """The layers whose far reads are worth least, by sensitivity times the error that is left."""
        left = torch.tensor(self.learned.sensitivity) * self.errors
        which = left.argsort()[: round(frac * len(self.sites))].tolist()
        return self.with_patches(baselines.some_layers(self.learned.layers, [self.sites[i].layer for i in which]))

    @functools.cached_property
    def errors(self) -> torch.Tensor:
        """Mean squared error of each adapter that was learned last."""
        learner = Learner(self.model, self.sites, self.config, {"validation": self.few}, Stages(None, "", None))
        return learner.errors("validation-gate", self.learned.layers).mean("error")

    @functools.cached_property
    def head_importance(self) -> torch.Tensor:
        """Of every head, (L, H)."""
        return baselines.head_importance(self.model, self.sites, self.learned.sensitivity, self.few, *self.near)

    @functools.cached_property
    def cosine_importance(self) -> torch.Tensor:
        """Of every sub-layer, (L,)."""
        return baselines.cosine_importance(self.model, self.sites, self.few)

    @functools.cached_property
    def linear_maps(self):
        """In place of every sub-layer."""
        fit, held_out = (self.learner.moments(part) for part in ("fit", "validation"))
        return baselines.linear_maps(self.sites, fit.moments, held_out.moments, self.config.strengths)

    def heads(self, frac: float) -> Measure:
        """Whole heads."""
        return self.with_patches(baselines.static_heads(self.sites, self.head_importance, frac, *self.near))

    def dropped(self, frac: float, *, linear: bool) -> Measure:
        """Whole sub-layers."""
        which = self.cosine_importance.argsort()[: round(frac * len(self.sites))].tolist()
        instead = self.linear_maps if linear else None
        return lambda tokens: baselines.measured_without(self.model, tokens, self.sites, which, instead)


def places(pretrained, corpus, config, parts, args):
    """Name of the file, text, documents, and whether it is another place than the test documents."""
    yield "comparison", corpus, parts["test"][: args.documents], False
    for context in args.contexts:
        documents = held_out_at(pretrained, corpus, config, context, args.documents)
        yield f"comparison-{corpus.name}-{context}", corpus, documents, True
    if args.other is not None:
        other = read_corpus(args.other)
        documents = running_contexts(pretrained, other, config.context, args.documents, config.seed)
        yield f"comparison-{other.name}-{config.context}", other, documents, True


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--further-text", help="as for cramlab consolidate")
    parser.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="as for cramlab consolidate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--documents", type=int, default=8, help="test documents, at most")
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="other lengths")
    parser.add_argument("--other", metavar="TEXT", help="another kind of text")
    parser.add_argument(
        "--router-steps", type=int, default=0, help="gradient steps of the router-only baseline; 0: none"
    )
    parser.add_argument(
        "--lora-steps", type=int, default=0, help="gradient steps of the row with light recovery by LoRA; 0: none"
    )
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.start is not None and (args.router_steps or args.lora_steps or args.further_text):
        parser.error("with --from nothing is learned: leave out --router-steps, --lora-steps and --further-text")
    config = RetrofitConfig() if args.start is None else config_before(read_record(args.start), args.start)
    config = overridden(config, args.overrides)
    pretrained, corpus = load(args.model), read_corpus(args.text)
    further = None if args.further_text is None else read_corpus(args.further_text)
    model = pretrained.model.to(args.device)
    parts = parts_of(pretrained, corpus, config, further)
    sites = consolidatable_sites(model)
    named, saved = identity(model, [parts[group] for group in GROUPS], config), None
    if args.start is not None:
        *saved, allowed = learned_before(model, args.start, corpus, config)
        if allowed is not corpus:
            parser.error("--from: give the text and the numbers of documents that the folder was calibrated with")
        named += saved[0]["weights_sha256"][:16]
    further_text = saved[0]["further_text"] if saved else further and further.described()
    rules = Rules(model, sites, config, parts, Stages(args.out / "state", named, _progress), args, saved)
    for file, text, documents, elsewhere in places(pretrained, corpus, config, parts, args):
        if documents:
            _compare(args.out / f"{file}.json", rules, pretrained, text, further_text, documents, elsewhere, named)


def _progress(stage: str, done: int, total: int, seconds: float) -> None:
    if done == total:
        print(time.strftime("%H:%M:%S"), f"{stage}: {total:,} tokens in {seconds:.1f} s", flush=True)


def _compare(path, rules, pretrained, text, further_text, documents, elsewhere, named) -> None:
    model, config, learned = rules.model, rules.config, rules.learned
    data = json.loads(path.read_text()) if path.exists() else {
        "header": records.header(documents[0].device), "name": pretrained.name, "note": pretrained.note,
        "text": text.described(), "further_text": further_text,
        "config": to_dict(config), "context": len(documents[0]), "documents": len(documents),
        "original": [original_loss(model, tokens) for tokens in documents],
        "ranks": learned.ranks, "explained": learned.explained, "sensitivity": learned.sensitivity,
        "bytes": _bytes(learned.layers), "gradients": rules.gradients, "identity": named, "rows": [],
    }  # fmt: skip
    of_others = {"documents": len(documents), "config": to_dict(config), "ranks": learned.ranks,
                 "sensitivity": learned.sensitivity, "text": text.described(), "identity": named}  # fmt: skip
    if changed := [name for name, value in of_others.items() if data.get(name) != value]:
        raise SystemExit(f"{path} has rows of something else ({', '.join(changed)}); choose another --out")
    have = {(row["rule"], row["asked"]) for row in data["rows"]}
    for name, frac, make in rules.rows(everywhere=elsewhere):
        if (name, frac) in have:
            continue
        start = time.perf_counter()
        with rules.around(name):
            measure = make()
            found = [measure(tokens) for tokens in documents]
        data["rows"].append({
            "rule": name, "asked": frac,
            "increase": [one.loss - before for one, before in zip(found, data["original"], strict=True)],
            "skipped_frac": [one.skipped_frac for one in found], "pairs_frac": [one.pairs_frac for one in found],
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        write_json(path, data)
        mean = sum(data["rows"][-1]["increase"]) / len(found)
        skipped = sum(one.skipped_frac for one in found) / len(found)
        print(time.strftime("%H:%M:%S"), path.stem, name, frac, f"skipped {skipped:.3f} increase {mean:+.4f}",
              flush=True)  # fmt: skip


def _bytes(layers: dict[int, ConsolidatedAttention]) -> int:
    """Of the folder's weights, as good as."""
    return sum(2 * parameter.numel() for layer in layers.values() for parameter in layer.parameters())


if __name__ == "__main__":
    main()
