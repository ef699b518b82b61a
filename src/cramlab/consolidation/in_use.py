"""What a consolidated model does in use: which tokens read, at which loss and which cost beside the original.

It is measured once, after learning, on the first test documents, and stored beside the record, so that a page needs no
model. Nothing is chosen by it.

Source: ours.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.exceptions
import torch
from torch import Tensor, nn

from cramlab import records
from cramlab.auditing.resume import Progress
from cramlab.consolidation.cost_in_use import costs
from cramlab.consolidation.folder import load_layers, record_digest
from cramlab.consolidation.measure import measured, token_losses
from cramlab.consolidation.patch.far_reads import FarReads, Seen
from cramlab.consolidation.patch.install import consolidatable_sites, patched
from cramlab.consolidation.patch.observe import observe, recorded
from cramlab.consolidation.rules.baselines import by_chance, static_window
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.files import write_json
from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.loading import Pretrained
from cramlab.hf.pieces import pieces

FILE, KIND, FORMAT = "in_use.json", "consolidation in use", 1
DOCUMENTS = 2  # test documents that are measured
_SHOWN = 1024  # tokens of the sample, at most
_PLACES = 16  # parts of the context in which reads are counted
BASELINES = {"random": "random tokens read, with the adapters", "window": "nothing far is read, no adapters"}


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of the file."""
    text = importlib.resources.files("cramlab.consolidation").joinpath("in_use.schema.json").read_text("utf-8")
    return json.loads(text)


def load_in_use(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured for a consolidation; None where nothing was, or for another one, as in older folders.

    Args:
        folder: folder of a consolidation.
        record: its record.

    Raises:
        RecordError: when the file is damaged or of another version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    data = records.read_json(path)
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(data))
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path) or "the file"
        said = f"{where}: {error.message[:200]}"
    else:
        said = _mismatch(data)
    if said:
        raise records.RecordError(
            f"{path} is damaged or of another version: {said}; remove it, and cramlab consolidate with --resume "
            "measures again"
        )
    return data if data["record_sha256"] == record_digest(record) else None


def _mismatch(data: Mapping[str, Any]) -> str:
    """The first list that does not fit the others, with the reason; the empty text where all do."""
    n_layers, reads, sample = len(data["layers"]), data["reads"], data["sample"]
    n_groups = len(data["changed"][0]) if data["changed"] else 0
    fitting = {
        "reads.edges": all(a < b for a, b in itertools.pairwise(reads["edges"])),
        "reads.by_layer": len(reads["by_layer"]) == n_layers,
        "reads.by_place": [len(row) for row in reads["by_place"]] == [n_layers] * (len(reads["edges"]) - 1),
        "changed": n_groups > 0 and [len(row) for row in data["changed"]] == [n_groups] * n_layers,
    }
    if sample is not None:
        lists = [sample[name] for name in ("pieces", "reads", "loss", "original")]
        fitting["sample"] = len({len(one) for one in lists}) == 1
        fitting["sample.reads"] = all(index < n_layers for row in sample["reads"] for index in row)
    return next((f"{name} does not fit the other fields" for name, fits in fitting.items() if not fits), "")


@torch.no_grad()
def measure_in_use(
    pretrained: Pretrained,
    folder: Path,
    documents: Sequence[tuple[str, Tensor]],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures documents with the original, the consolidation and two baselines, times both models, writes the file.

    Args:
        pretrained: the model, without a patch; it is left as it was.
        folder: folder of its consolidation, in which the file is written.
        documents: names and tokens (T,) of documents that nothing was learned from, cut to the shortest of them. The
            first is the sample.
        progress: called as `(stage, tokens done, tokens in all, seconds)`.

    Returns:
        A document of `in_use.schema.json`.

    Raises:
        ConsolidationError: when the folder does not fit the model.
    """
    model, begun = pretrained.model, time.perf_counter()
    record, layers = load_layers(model, folder)
    sites = [site for site in consolidatable_sites(model) if site.layer in layers]
    shortest = min(len(tokens) for _, tokens in documents)
    documents = [(name, tokens[:shortest]) for name, tokens in documents]
    n_all = sum(len(tokens) for _, tokens in documents)

    def report(done: int, stage: str = "reads in use") -> None:
        if progress is not None:
            progress(stage, done, n_all, time.perf_counter() - begun)

    passes, baselines, done = [], [], 0
    for _, tokens in documents:
        passes.append(_document(model, sites, tokens, layers))
        baselines.append(_baselines(model, sites, tokens, layers, record["skipped_frac"], passes[-1]["original"]))
        done += len(tokens)
        report(done)
    name, sample = documents[0]
    cost = costs(model, layers, sample)
    report(n_all, "cost in use")
    far = torch.arange(len(sample)) >= record["window"] + record["n_sinks"]
    reads = torch.stack([p["reads"] for p in passes]).double()  # (documents, layers, T)
    edges = _edges(record["window"] + record["n_sinks"], len(sample))
    data = {
        "kind": KIND,
        "format": FORMAT,
        "record_sha256": record_digest(record),
        "header": records.header(next(model.parameters()).device),
        "documents": len(documents),
        "context": len(sample),
        "layers": [site.layer for site in sites],
        "reads": {
            "by_layer": reads[:, :, far].mean((0, 2)).tolist(),
            "edges": edges,
            "by_place": [reads[:, :, a:b].mean((0, 2)).tolist() for a, b in itertools.pairwise(edges)],
        },
        "changed": torch.stack([p["changed"] for p in passes]).mean(0).tolist(),
        "increase": _mean([p["increase"] for p in passes]),
        "skipped_frac": _mean([p["skipped_frac"] for p in passes]),
        "baselines": [
            {"name": kind, "increase": _mean([b[kind][0] for b in baselines]),
             "skipped_frac": _mean([b[kind][1] for b in baselines])}
            for kind in BASELINES
        ],
        "sample": _sample(pretrained, name, sample, passes[0]),
        "cost": cost,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    data = records.finite(data)
    write_json(folder / FILE, data)
    return data


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _edges(first: int, n_tokens: int) -> list[int]:
    """Positions that divide the tokens with far keys into parts of nearly equal length."""
    n = min(_PLACES, n_tokens - first)
    return [first + (n_tokens - first) * i // n for i in range(n + 1)]


def _document(
    model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor, layers: Mapping[int, FarReads]
) -> dict[str, Any]:
    """One document: losses of both models by token, reads (layers, T), and what far reads change (layers, groups)."""
    original = token_losses(model, tokens).double().cpu()
    recorders = recorded(layers)
    with patched(model, recorders):
        ours = token_losses(model, tokens).double().cpu()
    counts = sum((r.counts for r in recorders.values()), start=type(next(iter(recorders.values())).counts)())
    return {
        "original": original,
        "loss": ours,
        "increase": float(ours.mean() - original.mean()),
        "skipped_frac": counts.skipped_frac,
        "reads": torch.stack([recorders[site.layer].reads(len(tokens)) for site in sites]),
        "changed": _changed(model, sites, tokens, next(iter(layers.values()))),
    }


def _changed(model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor, one: FarReads) -> Tensor:
    """Squared length that far reads add to the heads' outputs, divided by that of full attention, (layers, groups)."""
    config: Any = model.config
    n_groups = getattr(config, "num_key_value_heads", None) or sites[0].n_heads
    if not isinstance(n_groups, int) or any(site.n_heads % n_groups for site in sites):
        n_groups = 1  # groups differ between layers, so each layer is one
    shares = torch.zeros(len(sites), n_groups, dtype=torch.float64)

    def look(i: int, seen: Seen) -> None:
        full, near = (heads[seen.far].double() for heads in (seen.full, seen.near))  # (N, H, Dh)
        added, whole = (x.square().sum((0, 2)).view(n_groups, -1).sum(1).cpu() for x in (full - near, full))
        shares[i] = added / whole.clamp(min=1e-30)

    observe(model, sites, tokens[None], look, window=one.window, n_sinks=one.n_sinks)
    return shares


def _baselines(
    model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor, layers: Mapping[int, ConsolidatedAttention],
    skipped_frac: float, original: Tensor,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Loss increase and share of far reads skipped by name of the baseline, at the share of the consolidation."""
    one = next(iter(layers.values()))
    rules = {
        "random": by_chance(layers, skipped_frac, seed=0),
        "window": static_window(sites, one.window, one.n_sinks),
    }
    found = {name: measured(model, tokens, rule) for name, rule in rules.items()}
    return {name: (row.loss - float(original.mean()), row.skipped_frac) for name, row in found.items()}


def _sample(pretrained: Pretrained, name: str, tokens: Tensor, measured_pass: Mapping[str, Any]) -> dict[str, Any]:
    """The last tokens of a document: text, loss as next token (None for a first one), and layers that read."""
    first = max(0, len(tokens) - _SHOWN)
    texts = pieces(pretrained.decode, tokens.tolist())[first:]
    reads = measured_pass["reads"].T[first:]  # (T, layers)

    def losses(kind: str) -> list[float | None]:
        return [None, *measured_pass[kind].tolist()][first:]

    return {
        "document": name,
        "first": first,
        "pieces": texts,
        "reads": [row.nonzero().squeeze(1).tolist() for row in reads],
        "loss": losses("loss"),
        "original": losses("original"),
    }
