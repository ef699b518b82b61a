"""Transfers memory and router of a model trained on SRCD to irregular series; embedding and heads are new."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cramlab import records
from cramlab.batch import InputSpec
from cramlab.catalog import MIXERS
from cramlab.config import ConfigError, from_dict
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.model import ModelConfig, SequenceModel
from cramlab.training.folder import own_checkpoint
from cramlab.training.irregular.fit import FitConfig, Start
from cramlab.training.start import EMBEDDING, HEADS

RATE_FROM = "embedding"  # the random router reads as often as this way's router
# By mixer. "embedding" trains only the new parts, embedding and heads; "all" trains everything. The other ways transfer
# no weights: "scratch" trains everything, "no_encoding" without an encoding phase, "untrained" with the router frozen
# at its initial weights, "random" embedding and heads with a router that reads at random.
WAYS: dict[str, tuple[str, ...]] = {
    "cram": ("scratch", "no_encoding", "untrained", "embedding", "all", "random"),
    "seqboat": ("scratch", "embedding"),
}
_LAYERS = "layers."


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A trained model to transfer.

    Attributes:
        mixer: name of the mixer in the catalogue, a key of `WAYS`.
        model: config of the model.
        layers: averaged weights of the layers, without embedding and heads.
        record: record of the run.
        sha256: SHA-256 of the run's checkpoint and record.
    """

    mixer: str
    model: ModelConfig
    layers: dict[str, Tensor]
    record: dict[str, Any]
    sha256: str

    @classmethod
    def from_run(cls, folder: Path) -> Carried:
        """Loads the model of a finished run.

        Raises:
            ConfigError: when the folder holds no finished run, its mixer cannot be transferred, or checkpoint and
                record do not belong together.
        """
        files = folder / "checkpoint.pt", folder / "record.json"
        if not all(file.is_file() for file in files):
            raise ConfigError(f"--source {folder} holds no finished run; train one with cramlab run transfer")
        record = records.read(folder / "record.json")
        if record["mixer"] not in WAYS:
            raise ConfigError(f"--source {folder} is a run of {record['mixer']}; give a run of {' or '.join(WAYS)}")
        if record["status"] != "finished":
            raise ConfigError(f"--source {folder} holds a run that failed; train one with cramlab run transfer")
        like = ModelConfig(mixer=MIXERS[record["mixer"]]())
        averaged = own_checkpoint(folder, record["config"])["average"]
        weights = {name.removeprefix("module."): value for name, value in averaged.items()}
        carried = cls(
            mixer=record["mixer"],
            model=from_dict(record["config"]["model"], like),
            layers={name: value for name, value in weights.items() if name.startswith(_LAYERS)},
            record=record,
            sha256=hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        )
        carried.put_into(SequenceModel(carried.model, InputSpec(vocab_sizes=(), n_continuous=1, n_classes=2)))
        return carried

    def about(self) -> dict[str, Any]:
        """Returns the description of the source that documents hold."""
        read = self.record["train_reads_frac"] * self.record["n_train_tokens"]
        names = ("experiment", "size", "variant", "seed", "revision")
        return {name: self.record[name] for name in names} | {"train_reads": round(read)}

    def put_into(self, model: SequenceModel) -> None:
        """Copies the layers' weights into a model with the same layers.

        Raises:
            ConfigError: when the layers differ or a weight is not finite.
        """
        state = model.state_dict()
        wanted = {name: value.shape for name, value in state.items() if name.startswith(_LAYERS)}
        held = {name: value.shape for name, value in self.layers.items()}
        if wrong := sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)):
            raise ConfigError(f"the source's checkpoint and record are of different models (in {wrong[0]})")
        if wrong := [name for name, value in self.layers.items() if not value.isfinite().all()]:
            raise ConfigError(f"the source's checkpoint holds weights that are not finite (in {wrong[0]})")
        model.load_state_dict(state | self.layers)


def begin(carried: Carried, way: str, config: FitConfig, *, rate: float | None = None) -> tuple[Start, FitConfig]:
    """Returns the start of a way of transferring, and its training settings.

    A router that is transferred or cannot learn has no encoding phase; a frozen one has no audits either, so that
    training reads are those that the gate itself selects.

    Args:
        carried: the source; ways that transfer no weights use its shape alone.
        way: one of `WAYS`.
        config: settings of training from scratch.
        rate: share of visits that the random router reads; None: 0.
    """
    frozen = way in ("untrained", "embedding", "random")
    if way != "scratch":
        config = dataclasses.replace(config, encoding_epochs=0)
    if frozen:
        config = dataclasses.replace(config, audit_frac=0.0, audit_labels=False)
    model = carried.model
    if way == "random":
        router = RouterConfig(name="random", random_frac=0.0 if rate is None else rate)
        model = dataclasses.replace(model, mixer=CRAMConfig(router=router))

    def prepare(fresh: SequenceModel) -> None:
        if way in ("embedding", "all"):
            carried.put_into(fresh)
        for name, parameter in fresh.named_parameters():
            if way == "embedding":
                parameter.requires_grad_(name.startswith(HEADS + EMBEDDING))
            elif way == "untrained":
                parameter.requires_grad_(".gate." not in name)

    return Start(model=model, prepare=prepare), config
