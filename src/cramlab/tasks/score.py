"""Scores answers that a model trained anywhere gave to exported sequences.

The sequences come from `cramlab.tasks.export.export` as `DATA.npz` with `DATA.npz.datasheet.json`. The predictions are
an `.npz` file with these arrays:

    answer          predicted answer of each token, whole numbers (n_sequences, seq_len); read where one is asked
    read            true for tokens that attended, bool (n_sequences, seq_len); may be missing
    n_train_tokens  tokens of training, one number; may be missing
    state_bytes     bytes carried from token to token in decoding, one number; may be missing
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cramlab import records
from cramlab.errors import UsageError
from cramlab.tasks.export import content_hash

KIND = "score"
_NUMBERS = ("n_train_tokens", "state_bytes")


def score_predictions(predictions: Path, data: Path, *, name: str) -> dict[str, Any]:
    """The document of a model's answers: accuracy over all queries and by slice, share of reads, and what it costs.

    Args:
        predictions: file of the predictions.
        data: file of the exported sequences.
        name: name of the model.

    Returns:
        A document of kind "score" with the fields "name", "task", "size", "data_sha256", "metrics" and "oracle".

    Raises:
        UsageError: when a file is missing or no `.npz`, data and datasheet do not belong together, or an array has
            another type, shape or range; names file, array and fix.
    """
    truth = _arrays(data)
    sheet = _datasheet(data, truth)
    given = _arrays(predictions)
    asked = truth["answer"] >= 0
    answer = _array(given, "answer", asked.shape, "iu", predictions)
    right = (answer == truth["answer"]) & asked
    metrics: dict[str, Any] = {"retrieval_acc": _share(right, asked), "n_queries": int(asked.sum())}
    for slice_name in sheet["slices"]:
        metrics[f"retrieval_acc_{slice_name}"] = _share(right, truth[slice_name].astype(bool))
    metrics["attention_frac"] = None
    if "read" in given:
        metrics["attention_frac"] = float(_array(given, "read", asked.shape, "b", predictions).mean())
    metrics |= {number: _number(given, number, predictions) for number in _NUMBERS}
    return records.finite({
        "kind": KIND,
        "schema_version": records.SCHEMA_VERSION,
        "name": name,
        "task": sheet["task"],
        "config": sheet["config"],
        "split": sheet["split"],
        "data_sha256": sheet["sha256"],
        "metrics": metrics,
        "oracle": sheet["oracle"],
    })  # fmt: skip


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an .npz file of arrays ({error}); write it with numpy.savez") from error


def _datasheet(data: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The datasheet beside the data, whose hash must be that of the arrays."""
    beside = data.with_name(data.name + ".datasheet.json")
    if not beside.is_file():
        raise UsageError(f"{beside} is missing; export the sequences again, and keep both files in one folder")
    sheet = records.read_json(beside)
    found = content_hash(arrays)
    if not isinstance(sheet, dict) or sheet.get("sha256") != found:
        raise UsageError(f"{data} has another content hash ({found}) than {beside.name} says; export it again")
    return {"slices": ("recurring", "novel", "rebound")} | sheet


def _array(
    given: dict[str, np.ndarray], name: str, shape: tuple[int, ...], kinds: str, path: Path
) -> np.ndarray:  # fmt: skip
    if name not in given:
        raise UsageError(f"{path} holds no array {name}; give one of the shape {shape}")
    array = given[name]
    if array.shape != shape or array.dtype.kind not in kinds:
        kind = "bool" if kinds == "b" else "whole numbers"
        raise UsageError(f"{path}: {name} is {array.dtype} {array.shape}; give {kind} of the shape {shape}")
    return array


def _number(given: dict[str, np.ndarray], name: str, path: Path) -> int | None:
    if name not in given:
        return None
    array = given[name]
    if array.size != 1 or array.dtype.kind not in "iu" or int(array.item()) < 0:
        raise UsageError(f"{path}: {name} is {array.dtype} {array.shape}; give one whole number from 0")
    return int(array.item())


def _share(right: np.ndarray, among: np.ndarray) -> float | None:
    return float(right[among].mean()) if among.any() else None
