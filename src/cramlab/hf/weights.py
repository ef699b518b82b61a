"""Identifying a model: a digest of all its weights, and a digest of its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.errors import LoadError

PATCH = "consolidated"  # name of the sub-module that a patch adds under an attention module; no digest covers it
# Fields of a configuration that say where it comes from or how it is run, not what the model is.
_NO_PART_OF_THE_MODEL = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes and values (as float32) of all tensors that the unpatched model saves.

    Parameters come first, by name; buffers and other tensors of quantised layers follow. Tied weights count once.
    Weights that accelerate has offloaded are read from where they are stored.

    Raises:
        LoadError: when the values of a weight cannot be read.
    """
    sha = hashlib.sha256()
    for name, tensor in _all_tensors(model):
        _add(sha, name, _values(model, name, tensor))
    return sha.hexdigest()


def config_digest(model: nn.Module) -> str:
    """SHA-256 of the configuration, without fields on its origin, and of the precision of the weights."""
    config: Any = getattr(model, "config", None)
    fields = _of_the_model(config.to_dict()) if hasattr(config, "to_dict") else {}
    precision = sorted({str(tensor.dtype) for _, tensor in _all_tensors(model)})
    canonical = json.dumps([fields, precision], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _of_the_model(fields: Any) -> Any:
    if isinstance(fields, dict):
        kept = {str(name): value for name, value in fields.items() if name not in _NO_PART_OF_THE_MODEL}
        return {name: _of_the_model(value) for name, value in kept.items() if not name.startswith("_")}
    return [_of_the_model(value) for value in fields] if isinstance(fields, (list, tuple)) else fields


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then other saved tensors, each in order of names; without those of a patch."""
    patch = f".{PATCH}."
    parameters = dict(model.named_parameters())
    seen = {id(parameter) for parameter in parameters.values()}
    further = {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) not in seen}
    for tensors in (parameters, further):
        for name, tensor in sorted(tensors.items()):
            if patch in name:
                continue
            if not isinstance(tensor, Tensor):
                raise LoadError(f"{name} is a {type(tensor).__name__}, which has no digest; dequantise the model first")
            yield name, tensor


def _add(sha: Any, name: str, tensor: Tensor) -> None:
    """Adds one tensor to a digest; where float32 loses digits, also its own bytes."""
    values = tensor.detach().cpu().contiguous()
    sha.update(f"{name} {tuple(values.shape)}\0".encode())
    single = values.float()
    sha.update(single.numpy().data)
    if values.dtype.itemsize > 2 and values.dtype != torch.float32 and not torch.equal(single.to(values.dtype), values):
        sha.update(str(values.dtype).encode() + values.flatten().view(torch.uint8).numpy().tobytes())


def _values(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself or, on the meta device, the values that a hook of accelerate fetches for it."""
    if tensor.device.type != "meta":
        return tensor
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            kept = getattr(one, "weights_map", None)
            if kept is None:
                continue
            try:
                return kept[".".join(parts[depth:])]
            except KeyError:
                continue
    raise LoadError(f"{name} has no values (device meta), so the model cannot be identified; load it with its weights")
