"""Saves a consolidation to a folder, and loads a model with it: `load_consolidated`, `skip_counts`."""

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

from cramlab.consolidation.attention import ConsolidatedAttention
from cramlab.consolidation.calls import NAMES, closed_here
from cramlab.consolidation.install import consolidatable_sites, install, installed, remove
from cramlab.consolidation.patch import Counts, FarReads
from cramlab.errors import ConsolidationError
from cramlab.files import write_bytes, write_json
from cramlab.hf.attention_sites import attention_sites, longest_context
from cramlab.hf.loading import load as load_pretrained
from cramlab.hf.weights import weights_digest

FORMAT = 2
RECORD, WEIGHTS = "consolidation.json", "consolidation.safetensors"


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema that every record meets."""
    text = (
        importlib.resources.files("cramlab.consolidation")
        .joinpath("consolidation.schema.json")
        .read_text(encoding="utf-8")
    )
    return json.loads(text)


def _validate(record: Any, path: Path) -> None:
    """Raises `ConsolidationError`, which says where, unless the record has this format and meets the schema."""
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ConsolidationError(f"{path} has format {found}, this version of cramlab reads {FORMAT}")
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(record))
    if error is not None:
        where = ".".join(str(p) for p in error.absolute_path) or "the record"
        raise ConsolidationError(f"{path} is damaged: {where}: {error.message}; consolidate again")
    if record.get("record_sha256", _digest(record)) != _digest(record):
        raise ConsolidationError(
            f"{path} was changed after it was written, so its promise no longer holds; restore it, or consolidate "
            "again (--from FOLDER calibrates what was learned for another promise)"
        )


def _digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without this field and how long it all took; its threshold carries the promise."""
    rest = {name: value for name, value in record.items() if name not in ("record_sha256", "seconds")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save(folder: Path, layers: Mapping[int, ConsolidatedAttention], model: nn.Module, record: dict[str, Any]) -> None:
    """Writes weights first, then the record: a folder without record is unfinished.

    Args:
        folder: made if needed.
        layers: by layer, all with one threshold; weights are kept in half precision, see `distil.rounded`.
        model: that they were made for.
        record: the further fields that `consolidation.schema.json` asks for.

    Raises:
        ConsolidationError: when the record does not meet the schema.
    """
    tensors = {f"{i}.{name}": value.detach().to("cpu", torch.float32 if name in ("shift", "scale") else torch.float16)
               for i, layer in layers.items() for name, value in layer.state_dict().items()}  # fmt: skip
    weights = to_bytes(tensors)
    one = next(iter(layers.values()))
    config: Any = model.config
    complete = {
        "format": FORMAT,
        "model": {"family": config.model_type, "n_layers": config.num_hidden_layers, "sha256": weights_digest(model)},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "window": one.window,
        "n_sinks": one.n_sinks,
        "threshold": None if one.threshold == float("inf") else one.threshold,
        "ranks": {str(i): layer.rank for i, layer in layers.items()},
        "units": one.units,
    } | record
    # As it will be read: a tuple is a list then.
    complete = json.loads(json.dumps(complete, allow_nan=False))
    complete["record_sha256"] = _digest(complete)
    _validate(complete, folder / RECORD)
    _write(folder, weights, complete)


def _write(folder: Path, weights: bytes, record: dict[str, Any]) -> None:
    """Puts both files in place, each of them whole."""
    write_bytes(folder / WEIGHTS, weights)  # `save_file` would let nobody else read it
    write_json(folder / RECORD, record)


@dataclass(frozen=True)
class _Kept:
    """What was loaded, to be written beside the model when it is saved."""

    weights: bytes
    record: dict[str, Any]

    def __call__(self, model: nn.Module, folder: Path) -> None:
        """Writes the consolidation of a model into a folder.

        Raises:
            ConsolidationError: when gates or adapters have been trained since, so that the promise was made for others.
        """
        kept = from_bytes(self.weights)
        for site in attention_sites(model):
            layer = getattr(site.attention, FarReads.CHILD, None)
            for name, tensor in () if layer is None else layer.state_dict().items():
                if not torch.equal(tensor.cpu(), kept[f"{site.layer}.{name}"].to(tensor.dtype)):
                    raise ConsolidationError(
                        f"layer {site.layer}'s {name} is not the one that was loaded, so the promise does not hold for "
                        "it; keep the layers' own state_dict()"
                    )
        _write(folder, self.weights, self.record)


def load(model: str | nn.Module, folder: str | Path) -> nn.Module:
    """A pretrained model with a consolidation in place: generate and evaluation harnesses use it as they did before.

    Args:
        model: a name or folder that `cramlab consolidate` takes, or the loaded model itself (SDPA attention).
        folder: that `cramlab consolidate` wrote.

    Raises:
        ConsolidationError: when the folder is unfinished, damaged or of another version, or was made for other weights
            or another family; or when a probe pass shows that the patch is not live.
    """
    loaded = load_pretrained(model).model if isinstance(model, str) else model
    record, layers = saved_layers(loaded, Path(folder))
    install(loaded, layers, _Kept((Path(folder) / WEIGHTS).read_bytes(), record))
    try:
        probe(loaded)
    except BaseException:
        remove(loaded)
        raise
    return loaded


def saved_layers(loaded: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[int, ConsolidatedAttention]]:
    """Record and patches of a folder, by layer, beside the layers of the model that they were made for.

    Raises:
        ConsolidationError: as `load`, before anything is patched.
    """
    record = read_record(folder)
    family = getattr(getattr(loaded, "config", None), "model_type", None)
    made_for = record["model"]
    if family != made_for["family"]:
        raise ConsolidationError(f'{folder} was made for family "{made_for["family"]}", this model is "{family}"')
    n_layers = getattr(loaded.config, "num_hidden_layers", None)
    if n_layers != made_for["n_layers"]:
        raise ConsolidationError(f"{folder} was made for {made_for['n_layers']} layers, this model has {n_layers}")
    if weights_digest(loaded) != made_for["sha256"]:
        raise ConsolidationError(
            f"{folder} was made for other weights of this family (SHA-256 {made_for['sha256'][:12]}...); load the "
            "model that it was made for, in the same precision, or consolidate this one"
        )
    sites = {site.layer: site for site in consolidatable_sites(loaded)}
    tensors = _tensors(folder, record)
    if unknown := sorted(set(map(int, record["ranks"])) - sites.keys()):
        raise ConsolidationError(f"{folder / RECORD} is damaged: this model has no layers {unknown} to patch")
    longest = longest_context(loaded)
    if longest is not None and record["window"] + record["n_sinks"] >= longest:
        raise ConsolidationError(
            f"{folder / RECORD} has a window of {record['window']} and {record['n_sinks']} first keys, and the model "
            f"sees {longest} tokens, so nothing is far; consolidate again"
        )
    layers: dict[int, ConsolidatedAttention] = {}
    for name, rank in record["ranks"].items():
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == name}
        try:
            layer = ConsolidatedAttention.beside(
                sites[int(name)], rank=rank, units=record["units"], window=record["window"], n_sinks=record["n_sinks"]
            )
            layer.load_state_dict(own)
        except RuntimeError as error:
            raise ConsolidationError(f"{folder} is damaged: layer {name} does not fit ({error})") from error
        threshold = float("inf") if record["threshold"] is None else record["threshold"]
        layers[int(name)] = layer.requires_grad_(False).at(threshold)
    return record, layers


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON of a folder.

    Raises:
        ConsolidationError: when there is none, or of another version.
    """
    path = folder / RECORD
    if not path.exists():
        raise ConsolidationError(f"{folder} holds no {RECORD}: no consolidation, or an unfinished one (--resume)")
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ConsolidationError(f"{path} is damaged ({error}); consolidate again") from error
    _validate(record, path)
    return record


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _tensors(folder: Path, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    try:
        weights = path.read_bytes()
        if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
            raise ConsolidationError(f"{path} is not the file that {RECORD} was written with; consolidate again")
        tensors = from_bytes(weights)
    except (OSError, SafetensorError) as error:
        raise ConsolidationError(f"{path} cannot be read ({error}); consolidate again") from error
    if broken := sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())):
        raise ConsolidationError(f"{path} holds numbers that are not finite ({broken[0]}); consolidate again")
    return tensors


@torch.inference_mode()
def probe(model: nn.Module) -> None:
    """Runs a context just longer than the window and looks whether every patch was asked; counts start anew.

    Raises:
        ConsolidationError: when one was not.
    """
    layers = installed(model)
    for layer in layers.values():
        layer.tally.reset()
    longest = max(layer.window + layer.n_sinks for layer in layers.values()) + 1
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, longest, dtype=torch.int64, device=device), use_cache=False)
    for name, layer in layers.items():
        if layer.counts.far_tokens != longest - layer.window - layer.n_sinks:
            raise ConsolidationError(f"the patch at {name} was not asked; the model's attention does not go through it")
        layer.tally.reset()


@dataclass(frozen=True)
class Report:
    """Which modules are patched, and what they have done since loading.

    Attributes:
        live: whether the model's attention goes through the patches and their hooks are in place.
        layers: counts by name of the attention module.
    """

    live: bool
    layers: dict[str, Counts]

    @property
    def total(self) -> Counts:
        """Over all layers."""
        return sum(self.layers.values(), Counts())

    def __str__(self) -> str:
        """A line a layer, then the sum."""
        lines = [f"patch {'live' if self.live else 'NOT LIVE'} on {len(self.layers)} attention modules"]
        for name, c in [*self.layers.items(), ("all", self.total)]:
            pairs = (c.window_pairs + c.far_pairs) / c.causal_pairs if c.causal_pairs else 0.0
            lines.append(
                f"{name}: {c.far_reads}/{c.far_tokens} far reads made ({c.skipped_frac:.1%} skipped), "
                f"{pairs:.1%} of causal pairs scored; keys and values written for all {c.tokens} tokens, "
                f"{c.unreachable} of them out of every later token's reach"
            )
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """See `Report`; of a model without a patch it says that nothing is live."""
    layers = installed(model)
    config: Any = getattr(model, "config", None)
    live = bool(layers) and getattr(config, "_attn_implementation", None) in NAMES.values()
    live = live and all(layer.attached and layer not in closed_here.get() for layer in layers.values())
    return Report(live, {name: layer.counts for name, layer in layers.items()})
