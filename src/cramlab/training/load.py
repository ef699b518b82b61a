"""Loads a trained model from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.optim.swa_utils import AveragedModel

from cramlab import records
from cramlab.catalog import MIXERS
from cramlab.config import ConfigError, from_dict, nearest
from cramlab.extensions import is_reference, load_class
from cramlab.model import ModelConfig, SequenceModel
from cramlab.tasks.changing import ChangingConfig
from cramlab.tasks.compositional import CompositionalConfig
from cramlab.tasks.copying import CopyingConfig
from cramlab.tasks.induction import InductionConfig
from cramlab.tasks.mqar import MQARConfig
from cramlab.tasks.phonebook import PhonebookConfig
from cramlab.tasks.rebinding import RebindingConfig
from cramlab.tasks.relabelling import RelabellingConfig
from cramlab.tasks.selective_copying import SelectiveCopyingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.tasks.variable_tracking import VariableTrackingConfig
from cramlab.training.folder import CHECKPOINT, CONFIG, own_checkpoint, restoring
from cramlab.training.machine import check_model
from cramlab.training.run import RunConfig, TrainingConfig

_TASKS = {
    task.__name__: task
    for task in (
        ChangingConfig,
        CompositionalConfig,
        CopyingConfig,
        InductionConfig,
        MQARConfig,
        PhonebookConfig,
        RebindingConfig,
        RelabellingConfig,
        SelectiveCopyingConfig,
        SRCDConfig,
        VariableTrackingConfig,
    )
}


def load_run(folder: Path) -> tuple[RunConfig, SequenceModel]:
    """Loads a run's config and its model, with the averaged weights of the checkpoint, in evaluation mode.

    Args:
        folder: folder of one run, finished or not, with `config.json` and `checkpoint.pt`.

    Raises:
        ConfigError: when the config has wrong types, or names a mixer or field that this version does not know.
        DamagedFileError: when one of the two files is missing, is damaged or belongs to another run.
    """
    for name in (CONFIG, CHECKPOINT):
        if not (folder / name).exists():
            raise records.RecordError(f"{folder} holds no {name}; give the folder of one run")
    data = records.read_json(folder / CONFIG)
    try:
        config = run_config(data)
        check_model(config)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    saved = own_checkpoint(folder, data)
    model = SequenceModel(config.model, config.task.input_spec)
    average = AveragedModel(model)
    with restoring(folder / CHECKPOINT):
        average.load_state_dict(saved["average"])
    model.load_state_dict(average.module.state_dict())
    return config, model.eval()


def run_config(data: Any) -> RunConfig:
    """The config of a run from plain data. The classes are those that the data name, from the catalog or outside."""
    name = data.get("mixer") if isinstance(data, dict) else None
    known = MIXERS.get(name) if isinstance(name, str) else None
    if known is None and (own := _named_class(data, "model", "mixer")) is not None:
        known = own
    task = _named_class(data, "task") or _TASKS.get(_type_at(data, "task"), SRCDConfig)
    for make in MIXERS.values() if known is None else (known,):
        like = RunConfig(
            experiment="", size="", mixer="", seed=0, task=task(), training=TrainingConfig(),
            model=ModelConfig(mixer=make()),
        )  # fmt: skip
        try:
            return from_dict(data, like)
        except ConfigError:
            if known is not None:
                raise
    known_names = nearest(str(name), MIXERS)
    raise ConfigError(f"mixer {json.dumps(name)} is unknown, and model.mixer fits none of the catalog{known_names}")


def _type_at(data: Any, *path: str) -> str:
    """The class that the data name at a path; empty if they name none."""
    for field in (*path, "type"):
        data = data.get(field) if isinstance(data, dict) else None
    return data if isinstance(data, str) else ""


def _named_class(data: Any, *path: str) -> type | None:
    """The class outside the package that the data refer to at a path; None if they do not."""
    reference = _type_at(data, *path)
    return load_class(reference) if is_reference(reference) else None
