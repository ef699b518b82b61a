"""Memory and router of a model trained on SRCD, carried to irregular series: embedding and heads are new."""

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
        sha256: of its checkpoint and record.
    """

    mixer: str
    model: ModelConfig
    layers: dict[str, Tensor]
    record: dict[str, Any]
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> Carried:
        """From the folder of a finished run.

        Raises:
            ConfigError: when there is none, its mixer is none that is carried, or its checkpoint is of another model.
        """
        files = folder / "checkpoint.pt", folder / "record.json"
        if not all(file.is_file() for file in files):
            raise ConfigError(f"--source {folder} holds no finished run; cramlab run transfer trains one")
        record = records.read(folder / "record.json")
        if record["mixer"] not in WAYS:
            raise ConfigError(f"--source {folder} is a run of {record['mixer']}; give one of {' or '.join(WAYS)}")
        if record["status"] != "finished":
            raise ConfigError(f"--source {folder} holds a run that failed; cramlab run transfer trains one")
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
        carried.load(SequenceModel(carried.model, InputSpec(vocab_sizes=(), n_continuous=1, n_classes=2)))
        return carried

    def about(self) -> dict[str, Any]:
        """What a document says of its source."""
        read = self.record["train_reads_frac"] * self.record["n_train_tokens"]
        names = ("experiment", "size", "variant", "seed", "revision")
        return {name: self.record[name] for name in names} | {"train_reads": round(read)}

    def load(self, model: SequenceModel) -> None:
        """Puts the layers' weights into a model of the same layers.

        Raises:
            ConfigError: when they are others, or hold numbers that are not finite.
        """
        state = model.state_dict()
        wanted = {name: value.shape for name, value in state.items() if name.startswith(_LAYERS)}
        held = {name: value.shape for name, value in self.layers.items()}
        if wrong := sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)):
            raise ConfigError(f"the source's checkpoint is of another model than its record (differs in {wrong[0]})")
        if wrong := [name for name, value in self.layers.items() if not value.isfinite().all()]:
            raise ConfigError(f"the source's checkpoint holds numbers that are not finite (in {wrong[0]})")
        model.load_state_dict(state | self.layers)


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
