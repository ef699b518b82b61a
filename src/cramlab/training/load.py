"""A trained model back from its folder."""

from __future__ import annotations

from pathlib import Path

from torch.optim.swa_utils import AveragedModel

from cramlab import records
from cramlab.catalog import MIXERS
from cramlab.config import ConfigError, from_dict, nearest
from cramlab.files import load_checkpoint
from cramlab.model import ModelConfig, SequenceModel
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.run import RunConfig, TrainingConfig


def load_run(folder: Path) -> tuple[RunConfig, SequenceModel]:
    """A run's config and its model for use: the averaged weights of its checkpoint, in evaluation mode.

    Args:
        folder: of one run, finished or not, with `config.json` and `checkpoint.pt`.

    Raises:
        ConfigError: when the config names a mixer or field that this version does not know.
        RecordError: when the folder lacks one of the two files.
    """
    for name in ("config.json", "checkpoint.pt"):
        if not (folder / name).exists():
            raise records.RecordError(f"{folder} holds no {name}; give the folder of one run")
    data = records.read_json(folder / "config.json")
    if data["mixer"] not in MIXERS:
        raise ConfigError(
            f'{folder / "config.json"}: mixer "{data["mixer"]}" is unknown{nearest(data["mixer"], MIXERS)}'
        )
    like = RunConfig(
        experiment="", size="", mixer="", seed=0, task=SRCDConfig(), training=TrainingConfig(),
        model=ModelConfig(mixer=MIXERS[data["mixer"]]()),
    )  # fmt: skip
    config = from_dict(data, like)
    model = SequenceModel(config.model, config.task.input_spec)
    average = AveragedModel(model)
    average.load_state_dict(load_checkpoint(folder / "checkpoint.pt")["average"])
    model.load_state_dict(average.module.state_dict())
    return config, model.eval()
