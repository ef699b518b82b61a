"""Runs that begin with the weights of another run and may train only some of them."""

from __future__ import annotations

from pathlib import Path

from cramlab import records
from cramlab.config import ConfigError, Name, checked
from cramlab.model import SequenceModel
from cramlab.training.folder import CHECKPOINT, CONFIG, RECORD, own_checkpoint, own_record
from cramlab.training.run import RunConfig

HEADS = ("norm.", "level_head.", "answer_head.")
EMBEDDING = ("embedding.",)


@checked("")
class TransferConfig(RunConfig):
    """A run that starts from another run.

    Attributes:
        source: name of a finished run in the same folder, whose averaged weights are the initial weights; empty: fresh
            weights.
        trainable: prefixes of the names of the parameters that are trained; empty: all parameters.
    """

    source: Name = ""
    trainable: tuple[str, ...] = ()

    @property
    def after(self) -> str:
        """Name of the source."""
        return self.source


def start(config: TransferConfig, model: SequenceModel, out: Path) -> None:
    """Loads the source's weights into a fresh model and freezes what is not to be trained.

    Args:
        config: the run.
        model: its model; changed in place.
        out: the run's folder; the source's folder is next to it.

    Raises:
        ConfigError: when the source is not finished, has other shapes, or no parameter would be trained.
        DamagedFileError: when a file of the source is damaged, or belongs to another run.
    """
    if config.source:
        folder = out.parent / config.source
        if not all((folder / name).exists() for name in (CONFIG, RECORD, CHECKPOINT)):
            raise ConfigError(f'source = "{config.source}": {folder} does not hold a finished run; train it first')
        data = records.read_json(folder / CONFIG)
        if own_record(folder, data)["status"] != "finished":
            raise ConfigError(f'source = "{config.source}": the run in {folder} failed; train it first')
        averaged = own_checkpoint(folder, data)["average"]
        weights = {name.removeprefix("module."): value for name, value in averaged.items() if name != "n_averaged"}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f'source = "{config.source}" has weights of another model or task: {error}') from error
    if config.trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(config.trainable))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"trainable = {config.trainable} matches no parameter; give prefixes such as {HEADS}")
