"""Memory and router of a model trained on SRCD, carried to irregular series: embedding and heads are new."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cramlab import records
from cramlab.catalog import MIXERS
from cramlab.config import ConfigError, from_dict
from cramlab.files import load_checkpoint
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.model import ModelConfig, SequenceModel
from cramlab.training.irregular import FitConfig, Start
from cramlab.training.start import EMBEDDING, HEADS

RATE_FROM = "embedding"  # the way whose reads the random router makes
# By mixer. "embedding" trains what is new, embedding and heads; "all" everything. The others carry nothing: they are
# trained from scratch, the second without reads by decree, the third with a router that stays as it was drawn.
WAYS: dict[str, tuple[str, ...]] = {
    "cram": ("scratch", "no_encoding", "untrained", "embedding", "all", "random"),
    "seqboat": ("scratch", "embedding"),
}
_LAYERS = "layers."


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A trained model to be carried over.

    Attributes:
        mixer: its name in the catalog, one of `WAYS`.
        model: its config.
        layers: its averaged weights without embedding and heads.
        record: of its run.
    """

    mixer: str
    model: ModelConfig
    layers: dict[str, Tensor]
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Carried:
        """From the folder of a finished run.

        Raises:
            ConfigError: when there is none, or its mixer is none that is carried.
        """
        if not (folder / "record.json").exists():
            raise ConfigError(f"--source {folder} holds no finished run; cramlab run transfer trains one")
        record = records.read(folder / "record.json")
        if record["mixer"] not in WAYS:
            raise ConfigError(f"--source {folder} is a run of {record['mixer']}; give one of {' or '.join(WAYS)}")
        like = ModelConfig(mixer=MIXERS[record["mixer"]]())
        averaged = load_checkpoint(folder / "checkpoint.pt")["average"]
        weights = {name.removeprefix("module."): value for name, value in averaged.items()}
        return cls(
            mixer=record["mixer"],
            model=from_dict(record["config"]["model"], like),
            layers={name: value for name, value in weights.items() if name.startswith(_LAYERS)},
            record=record,
        )

    def about(self) -> dict[str, Any]:
        """What a document says of its source."""
        read = self.record["train_reads_frac"] * self.record["n_train_tokens"]
        names = ("experiment", "size", "variant", "seed", "revision")
        return {name: self.record[name] for name in names} | {"train_reads": round(read)}

    def load(self, model: SequenceModel) -> None:
        """Puts the layers' weights into a model of the same layers."""
        model.load_state_dict(model.state_dict() | self.layers)


def begin(carried: Carried, way: str, config: FitConfig, *, rate: float | None = None) -> tuple[Start, FitConfig]:
    """How a way begins, and how it is trained.

    A router that is carried over or cannot learn has no encoding phase; a frozen one makes no audits either, so that
    training reads are what the gate itself lets through.

    Args:
        carried: the source; what carries nothing takes its shape alone.
        way: one of `WAYS`.
        config: of training from scratch.
        rate: share of visits that the random router reads.
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
            carried.load(fresh)
        for name, parameter in fresh.named_parameters():
            if way == "embedding":
                parameter.requires_grad_(name.startswith(HEADS + EMBEDDING))
            elif way == "untrained":
                parameter.requires_grad_(".gate." not in name)

    return Start(model=model, prepare=prepare), config
