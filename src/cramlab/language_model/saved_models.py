"""The models that a run saves while it trains, one folder for each, for the audit over training."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.utils import logging

from cramlab import records
from cramlab.config import to_dict
from cramlab.files import refuse_full_disk, write_json
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText

STEP_FILE = "step.json"


def step_folder(config: TextRunConfig, out: Path, step: int) -> Path:
    """Folder of the model after a step."""
    return out / config.name / f"step-{step:06d}"


def save_model(
    model: PreTrainedModel, text: PreparedText, config: TextRunConfig, out: Path, step: int, row: dict[str, Any]
) -> None:
    """Saves a model with its tokenizer for `hf.loading.load`; a folder that holds the same weights is kept.

    `row` holds the model's figures on held-out text at this step.
    """
    row = row | {"step": step, "reads_frac": row["attention_frac"], "config": to_dict(config),
                 "text_sha256": text.digest}  # fmt: skip
    folder = step_folder(config, out, step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    logging.disable_progress_bar()
    try:
        model.save_pretrained(partial)
        cast("Any", text.tokenizer).save_pretrained(partial)
        weights = _weights_digest(partial)
        write_json(partial / STEP_FILE, row | {"weights_sha256": weights})
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        refuse_full_disk(error, folder)
        raise
    if folder.exists():  # from the same run, which was stopped later
        file = folder / STEP_FILE
        kept = file.exists() and records.read_json(file).get("weights_sha256") == weights == _weights_digest(folder)
        shutil.rmtree(partial if kept else folder)
    if partial.exists():
        partial.replace(folder)


def _weights_digest(folder: Path) -> str | None:
    """SHA-256 of a saved model's weights; None when there are none."""
    path = folder / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
