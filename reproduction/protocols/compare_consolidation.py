r"""Loss against skipped far reads: consolidation, its oracle and the baselines, on documents held out of learning.

Works in the folder of `cramlab consolidate`, before it: everything is learned once, and `cramlab consolidate` with the
same --out, texts and --set and with --resume continues from there. Rows are written as they are measured; a row that
exists is kept. `comparison.json` has the test documents, `comparison-TEXT-CONTEXT.json` other lengths (documents of
test and calibration that are long enough) and another text (its documents concatenated and cut). Thresholds are those
of the validation documents everywhere. With `--from` nothing is learned: a folder of `cramlab consolidate` is measured,
beside the methods that need no gradient steps. Example:

    python -m reproduction.protocols.compare_consolidation smollm2 --text stdlib --set context=2048 \\
        --out runs/smollm2 --documents 8
    python -m reproduction.protocols.compare_consolidation smollm2 --text stdlib --from runs/less --contexts 1024 \\
        --out runs/elsewhere
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cramlab import records
from cramlab.auditing import read_corpus
from cramlab.auditing.resume import Stages, identity
from cramlab.config import overridden, to_dict
from cramlab.consolidation.compare.methods import Comparison, Extras
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.documents import Parts, held_out_at, parts_of, running_contexts
from cramlab.consolidation.earlier import config_before, learned_before
from cramlab.consolidation.folder import load_record
from cramlab.consolidation.measure import mean_loss
from cramlab.consolidation.patch.install import consolidatable_sites
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.consolidation.setting import Setting
from cramlab.files import write_json
from cramlab.hf.loading import Pretrained, load
from cramlab.text import Corpus


class Place(NamedTuple):
    """Documents of one length and text.

    Attributes:
        file: name of the record, without its ending.
        text: the corpus.
        documents: contexts, (T,) each.
        elsewhere: whether they are other documents than the test documents.
    """

    file: str
    text: Corpus
    documents: list[Tensor]
    elsewhere: bool


def places(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, parts: Parts, args: argparse.Namespace
) -> Iterator[Place]:
    """The test documents, then those of other lengths and of the other text."""
    yield Place("comparison", corpus, parts["test"][: args.documents], elsewhere=False)
    for context in args.contexts:
        documents = held_out_at(pretrained, corpus, config, context, args.documents)
        yield Place(f"comparison-{corpus.name}-{context}", corpus, documents, elsewhere=True)
    if args.other is not None:
        other = read_corpus(args.other)
        documents = running_contexts(pretrained, other, config.context, args.documents, config.seed)
        yield Place(f"comparison-{other.name}-{config.context}", other, documents, elsewhere=True)


def main(given: Sequence[str] | None = None) -> None:
    """Parses the command line, learns, and measures every method in every place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--further-text", help="as for cramlab consolidate")
    parser.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="as for cramlab consolidate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--documents", type=int, default=8, help="number of test documents, at most")
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="other lengths of documents, tokens")
    parser.add_argument("--other", metavar="TEXT", help="another kind of text")
    parser.add_argument("--rules", nargs="*", metavar="RULE", help="names of rows to be measured; default: all")
    parser.add_argument(
        "--router-steps",
        type=int,
        default=0,
        help="number of gradient steps of gates without adapters; 0: not compared",
    )
    parser.add_argument(
        "--lora-steps", type=int, default=0, help="gradient steps of light recovery by LoRA; 0: not compared"
    )
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.start is not None and (args.router_steps or args.lora_steps or args.further_text):
        parser.error("--from learns nothing: omit --router-steps, --lora-steps and --further-text")
    start: Path | None = args.start
    config = ConsolidationConfig() if start is None else config_before(load_record(start), start)
    config = overridden(config, args.overrides)
    pretrained, corpus = load(args.model), read_corpus(args.text)
    further = None if args.further_text is None else read_corpus(args.further_text)
    further_text = None if further is None else further.described()
    model = pretrained.model.to(args.device)
    parts = parts_of(pretrained, corpus, config, further)
    named, saved = identity(model, list(parts.values()), config), None
    if start is not None:
        record, learned, allowed = learned_before(model, start, corpus, config)
        if allowed is not corpus:
            parser.error("--from: give the text and the numbers of documents that the folder was calibrated with")
        named += record["weights_sha256"][:16]
        further_text, saved = record["further_text"], (record, learned)
    stages = Stages(args.out / "state", named, _progress)
    setting = Setting(model, consolidatable_sites(model), config, parts, stages)
    comparison = Comparison(setting, Extras(args.router_steps, args.lora_steps, args.lora_rank), saved)
    described = {"name": pretrained.name, "note": pretrained.note, "further_text": further_text, "identity": named}
    for place in places(pretrained, corpus, config, parts, args):
        if place.documents:
            _compare(args.out / f"{place.file}.json", comparison, place, described, args.rules)


def _progress(stage: str, done: int, total: int, seconds: float) -> None:
    if done == total:
        print(time.strftime("%H:%M:%S"), f"{stage}: {total:,} tokens in {seconds:.1f} s", flush=True)


def _compare(
    path: Path, comparison: Comparison, place: Place, described: dict[str, Any], rules: Sequence[str] | None
) -> None:
    """Measures methods on the documents of a place that the record at `path` lacks, and writes them there."""
    learned, documents = comparison.learned, place.documents
    depends_on = {
        "documents": len(documents), "config": to_dict(comparison.config), "ranks": learned.ranks,
        "sensitivity": learned.sensitivity, "text": place.text.described(), "identity": described["identity"],
    }  # fmt: skip
    data = json.loads(path.read_text()) if path.exists() else {
        "kind": "comparison",
        "header": records.header(documents[0].device), "name": described["name"], "note": described["note"],
        "text": depends_on["text"], "further_text": described["further_text"],
        "config": depends_on["config"], "context": len(documents[0]), "documents": len(documents),
        "original": [mean_loss(comparison.model, tokens) for tokens in documents],
        "ranks": learned.ranks, "explained": learned.explained, "sensitivity": learned.sensitivity,
        "bytes": _bytes(learned.layers), "gradients": comparison.gradients, "identity": described["identity"],
        "rows": [],
    }  # fmt: skip
    if changed := [name for name, value in depends_on.items() if data.get(name) != value]:
        raise SystemExit(f"{path} has rows of other work ({', '.join(changed)} differ); choose another --out")
    have = {(row["rule"], row["asked"]) for row in data["rows"]}
    for entry in comparison.entries(elsewhere=place.elsewhere):
        if (entry.rule, entry.asked) in have or (rules is not None and entry.rule not in rules):
            continue
        start = time.perf_counter()
        found = comparison.measure(entry, documents)
        increase = [one.loss - before for one, before in zip(found, data["original"], strict=True)]
        data["rows"].append({
            "rule": entry.rule, "asked": entry.asked, "increase": increase,
            "skipped_frac": [one.skipped_frac for one in found], "pairs_frac": [one.pairs_frac for one in found],
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        write_json(path, data)
        mean, skipped = sum(increase) / len(found), sum(one.skipped_frac for one in found) / len(found)
        print(time.strftime("%H:%M:%S"), path.stem, entry.rule, entry.asked,
              f"skipped {skipped:.3f} increase {mean:+.4f}", flush=True)  # fmt: skip


def _bytes(layers: Mapping[int, ConsolidatedAttention]) -> int:
    """Approximate size of the folder's weights, bytes."""
    return sum(2 * parameter.numel() for layer in layers.values() for parameter in layer.parameters())


if __name__ == "__main__":
    main()
