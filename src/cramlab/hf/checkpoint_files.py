"""Checks of a saved model: whether its files are complete, and the weights loaded from them usable."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cramlab.errors import LoadError

_LFS_POINTER = b"version https://git-lfs"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def brings_code(folder: Path) -> bool:
    """Whether the configuration of a folder's model or tokenizer names its own code.

    Raises:
        LoadError: when a configuration is not a JSON object.
    """
    configs = [folder / name for name in ("config.json", "tokenizer_config.json")]
    return any("auto_map" in _json_object(path) for path in configs if path.exists())


def check_safetensors(folder: Path) -> None:
    """Opens the safetensors files that a folder's weights are loaded from, if there are any.

    Raises:
        LoadError: when a file is missing, empty, truncated, or a git-lfs pointer.
    """
    from safetensors import safe_open

    files = [_WHOLE] if (folder / _WHOLE).exists() else []
    if not files and (index := folder / _INDEX).exists():
        found = _json_object(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise LoadError(f"{index} names no weight files; copy it again from the source of the model")
        files = sorted(set(found.values()))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise LoadError(
                f"{folder} lacks {len(missing)} of its {len(files)} weight files: {shortened(missing)}; copy them"
            )
    for path in (folder / file for file in files):
        try:
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise LoadError(
                        f"{path} is a git-lfs pointer instead of the weights; fetch them with: git lfs pull"
                    )
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except LoadError:
            raise
        except Exception as error:
            size = path.stat().st_size
            raise LoadError(
                f"{path} ({size:,} bytes) is damaged or truncated ({said(error)}); copy it again"
            ) from error


def refuse_incomplete(model: Any, found: Mapping[str, Any], source: str | Path) -> None:
    """Refuses a loaded model for which the files lack weights or hold them in another shape; tied ones may be missing.

    A pooler without weights is removed, as it would be random.

    Args:
        model: the loaded model.
        found: what `from_pretrained(output_loading_info=True)` reports.
        source: file, folder or name that the model was loaded from.

    Raises:
        LoadError: naming the weights.
    """
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    if other:
        raise LoadError(
            f"{len(other)} weights of {source} do not have the shape that its configuration requires: "
            f"{shortened(other)}; use config.json and weights of the same model"
        )
    missing = sorted(found["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):  # the pooler of an encoder, which is not used
        model.pooler = None
    elif missing:
        strange = sorted(found["unexpected_keys"])
        instead = f" (it holds others that the model does not know: {shortened(strange)})" if strange else ""
        raise LoadError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__}: {shortened(missing)}{instead}; they "
            "would be random. Use the complete model"
        )


def refuse_not_finite(model: nn.Module, source: str | Path) -> None:
    """Raises `LoadError`, which names the weights, when some hold NaN or infinity."""
    bad = [n for n, p in model.named_parameters() if p.device.type != "meta" and not bool(torch.isfinite(p).all())]
    if bad:
        raise LoadError(f"{len(bad)} weights of {source} hold NaN or infinity: {shortened(bad)}; copy the model again")


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many follow."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def said(error: Exception, most: int = 300) -> str:
    """The message of an error, in one short line; the name of its class when the message is empty."""
    return textwrap.shorten(str(error), most, placeholder=" ...") or type(error).__name__


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not JSON ({said(error)}); copy it again from the source of the model") from error
    if not isinstance(found, dict):
        raise LoadError(f"{path} holds a {type(found).__name__} instead of a JSON object; copy it again")
    return found
