"""A consolidation on disk: saving it, loading it into a model, and counting what it skips."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.exceptions
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from cramlab.consolidation.patch.calls import closed_here
from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.patch.install import consolidatable_sites, install, installed, remove
from cramlab.consolidation.patch.originals import NAMES
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.errors import ConsolidationError
from cramlab.files import write_bytes, write_json
from cramlab.hf.attention_sites import longest_context
from cramlab.hf.loading import load as load_pretrained
from cramlab.hf.structure import layer_of, text_config
from cramlab.hf.weights import weights_digest

FORMAT = 2
RECORD, WEIGHTS = "consolidation.json", "consolidation.safetensors"


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of records."""
    text = (
        importlib.resources.files("cramlab.consolidation")
        .joinpath("consolidation.schema.json")
        .read_text(encoding="utf-8")
    )
    return json.loads(text)


def _validate(record: Any, path: Path) -> None:
    """Raises `ConsolidationError`, which names the field, unless the record has this format and meets the schema."""
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ConsolidationError(
            f"{path} has format {found}, this version of cramlab reads {FORMAT}; consolidate again"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(record))
    if error is not None:
        where = ".".join(str(p) for p in error.absolute_path) or "the record"
        raise ConsolidationError(f"{path} is damaged: {where}: {error.message}; consolidate again")
    if record.get("record_sha256", record_digest(record)) != record_digest(record):
        raise ConsolidationError(
            f"{path} was changed after it was written, so its guarantee does not hold; restore the file, or "
            "consolidate again (with --from FOLDER for another guarantee without learning again)"
        )


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without this field and without durations; the guarantee depends on the record's threshold."""
    rest = {name: value for name, value in record.items() if name not in ("record_sha256", "seconds")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save(
    folder: Path, layers: Mapping[int, ConsolidatedAttention], model: nn.Module, record: dict[str, Any]
) -> dict[str, Any]:
    """Writes the weights, then the record; a folder without a record is unfinished.

    Args:
        folder: created if needed.
        layers: layers by index of the block, all with one threshold; weights are stored in half precision, see
            `rules.learned.rounded`.
        model: the model that they were made for.
        record: the other fields that `consolidation.schema.json` requires.

    Returns:
        The whole record, as it will be loaded.

    Raises:
        ConsolidationError: when the record does not meet the schema.
    """
    tensors = {f"{i}.{name}": value.detach().to("cpu", torch.float32 if name in ("shift", "scale") else torch.float16)
               for i, layer in layers.items() for name, value in layer.state_dict().items()}  # fmt: skip
    weights = to_bytes(tensors)
    one = next(iter(layers.values()))
    config: Any = model.config
    n_layers = text_config(model).num_hidden_layers
    complete = {
        "kind": "consolidation",
        "format": FORMAT,
        "model": {"family": config.model_type, "n_layers": n_layers, "sha256": weights_digest(model)},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "window": one.window,
        "n_sinks": one.n_sinks,
        "threshold": None if one.threshold == float("inf") else one.threshold,
        "ranks": {str(i): layer.rank for i, layer in layers.items()},
        "units": one.units,
    } | record
    # The digest is that of the record as it will be loaded, where a tuple is a list.
    complete = json.loads(json.dumps(complete, allow_nan=False))
    complete["record_sha256"] = record_digest(complete)
    _validate(complete, folder / RECORD)
    _write(folder, weights, complete)
    return complete


def _write(folder: Path, weights: bytes, record: dict[str, Any]) -> None:
    """Writes both files, each of them atomically."""
    write_bytes(folder / WEIGHTS, weights)  # safetensors' own `save_file` makes a file that only its owner can read
    write_json(folder / RECORD, record)


@dataclass(frozen=True)
class _Kept:
    """What was loaded, to be written again when the model is saved."""

    weights: bytes
    record: dict[str, Any]

    def __call__(self, model: nn.Module, folder: Path) -> None:
        """Writes the consolidation of a model into a folder.

        Raises:
            ConsolidationError: when gates or adapters have changed since they were loaded.
        """
        kept = from_bytes(self.weights)
        for attention, layer in installed(model).items():
            number = layer_of(model, attention)
            for name, tensor in layer.state_dict().items():
                if not torch.equal(tensor.cpu(), kept[f"{number}.{name}"].to(tensor.dtype)):
                    raise ConsolidationError(
                        f"layer {number}'s {name} is not the one that was loaded, so the guarantee does not hold "
                        "for it; save the layers' own state_dict() instead"
                    )
        _write(folder, self.weights, self.record)


def load(model: str | nn.Module, folder: str | Path) -> nn.Module:
    """Loads a consolidation into a pretrained model, which generates and is evaluated as before.

    Args:
        model: a name or folder that `cramlab consolidate` takes, or the loaded model itself (SDPA attention).
        folder: folder that `cramlab consolidate` wrote.

    Returns:
        The patched model.

    Raises:
        ConsolidationError: when the folder is unfinished, damaged or of another version, when it was made for other
            weights or another family, or when a probe pass shows that the patch is not called.
    """
    loaded = load_pretrained(model).model if isinstance(model, str) else model
    record, layers = load_layers(loaded, Path(folder))
    install(loaded, layers, _Kept((Path(folder) / WEIGHTS).read_bytes(), record))
    try:
        probe(loaded)
    except BaseException:
        remove(loaded)
        raise
    return loaded


def load_layers(loaded: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[int, ConsolidatedAttention]]:
    """Loads the record and the patches of a folder, by index of the block; nothing is installed.

    Args:
        loaded: the model that the folder was made for.
        folder: folder of a consolidation.

    Raises:
        ConsolidationError: as `load`.
    """
    record = load_record(folder)
    family = getattr(getattr(loaded, "config", None), "model_type", None)
    made_for = record["model"]
    if family != made_for["family"]:
        raise ConsolidationError(f'{folder} was made for family "{made_for["family"]}", this model is "{family}"')
    n_layers = getattr(text_config(loaded), "num_hidden_layers", None)
    if n_layers != made_for["n_layers"]:
        raise ConsolidationError(f"{folder} was made for {made_for['n_layers']} layers, this model has {n_layers}")
    if weights_digest(loaded) != made_for["sha256"]:
        raise ConsolidationError(
            f"{folder} was made for other weights of this family (SHA-256 {made_for['sha256'][:12]}...); load the "
            "model that it was made for, in the same precision, or consolidate this model"
        )
    sites = {site.layer: site for site in consolidatable_sites(loaded)}
    tensors = load_weights(folder, record)
    if unknown := sorted(set(map(int, record["ranks"])) - sites.keys()):
        raise ConsolidationError(f"{folder / RECORD} is damaged: this model has no layers {unknown} to patch")
    longest = longest_context(loaded)
    if longest is not None and record["window"] + record["n_sinks"] >= longest:
        raise ConsolidationError(
            f"{folder / RECORD} has a window of {record['window']} and {record['n_sinks']} first keys, but the model's "
            f"context is {longest} tokens, so nothing is far; consolidate again"
        )
    layers: dict[int, ConsolidatedAttention] = {}
    for name, rank in record["ranks"].items():
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == name}
        try:
            layer = ConsolidatedAttention.beside(
                sites[int(name)], rank=rank, units=record["units"], window=record["window"], n_sinks=record["n_sinks"],
                n_offsets=own["offsets"].numel() if "offsets" in own else 0,
            )  # fmt: skip
            layer.load_state_dict(own)
        except RuntimeError as error:
            raise ConsolidationError(
                f"{folder} is damaged: layer {name} does not fit ({error}); consolidate again"
            ) from error
        threshold = float("inf") if record["threshold"] is None else record["threshold"]
        layers[int(name)] = layer.requires_grad_(False).at(threshold)
    return record, layers


def load_record(folder: Path) -> dict[str, Any]:
    """Loads the record of a folder.

    Raises:
        ConsolidationError: when there is no record, or it is damaged or of another version.
    """
    path = folder / RECORD
    if not path.exists():
        raise ConsolidationError(
            f"{folder} holds no {RECORD}: it is not a consolidation, or an unfinished one (continue with --resume)"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConsolidationError(f"{path} is damaged ({error}); consolidate again") from error
    _validate(record, path)
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def load_weights(folder: Path, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Loads the tensors of a folder, by index of the block and name.

    Raises:
        ConsolidationError: when the file is missing, damaged or not the one that the record was written with.
    """
    path = folder / WEIGHTS
    try:
        weights = path.read_bytes()
        if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
            raise ConsolidationError(
                f"{path} is not the file that {RECORD} was written with; restore it, or consolidate again"
            )
        tensors = from_bytes(weights)
    except (OSError, SafetensorError) as error:
        raise ConsolidationError(f"{path} cannot be read ({error}); consolidate again") from error
    if broken := sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())):
        raise ConsolidationError(f"{path} holds NaN or infinity ({broken[0]}); consolidate again")
    return tensors


@torch.inference_mode()
def probe(model: nn.Module) -> None:
    """Runs a context just longer than the window and checks that every patch was called; counts are reset.

    Raises:
        ConsolidationError: when a patch was not called.
    """
    layers = installed(model)
    for layer in layers.values():
        layer.tally.reset()
    longest = max(layer.window + layer.n_sinks for layer in layers.values()) + 1
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, longest, dtype=torch.int64, device=device), use_cache=False)
    for name, layer in layers.items():
        if layer.counts.far_tokens != longest - layer.window - layer.n_sinks:
            raise ConsolidationError(
                f"the patch at {name} was not called, as the model's attention bypasses it; use a class of transformers"
            )
        layer.tally.reset()


@dataclass(frozen=True)
class SkipCounts:
    """What each patched attention module has read and skipped since the model was loaded.

    Attributes:
        live: whether the patches are open, their hooks installed, and the model's attention goes through them.
        layers: counts by name of the attention module.
        n_layers: number of layers of the model, those without a patch included.
    """

    live: bool
    layers: dict[str, Counts]
    n_layers: int

    @property
    def total(self) -> Counts:
        """Sum of the counts over all layers."""
        return sum(self.layers.values(), Counts())

    def __str__(self) -> str:
        """One line a layer, then the sum."""
        over = "" if len(self.layers) == self.n_layers else f" in {self.n_layers} layers; shares are over these modules"
        lines = [f"patch {'live' if self.live else 'NOT LIVE'} on {len(self.layers)} attention modules{over}"]
        for name, c in [*self.layers.items(), ("all", self.total)]:
            lines.append(
                f"{name}: {c.far_reads}/{c.far_tokens} far reads made ({c.skipped_frac:.1%} skipped), "
                f"{c.pairs_frac:.1%} of causal pairs scored; keys and values written for all {c.tokens} tokens, "
                f"{c.unreachable} of them unreachable for later tokens"
                + (f"; {c.audit_reads} reads and {c.audit_pairs} pairs to audit" if c.audit_reads else "")
            )
        return "\n".join(lines)


def skip_counts(model: nn.Module) -> SkipCounts:
    """The counts of a patched model since it was loaded; for a model without patches, `live` is False."""
    layers = installed(model)
    config: Any = getattr(model, "config", None)
    live = bool(layers) and getattr(config, "_attn_implementation", None) in NAMES.values()
    live = live and all(layer.attached and layer not in closed_here.get() for layer in layers.values())
    n_layers = getattr(text_config(model), "num_hidden_layers", len(layers))
    return SkipCounts(live, {name: layer.counts for name, layer in layers.items()}, n_layers)
