"""Mixers by the names that commands take: those of the catalog, and variants that differ in how they are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cramlab.catalog import MIXERS
from cramlab.config import ConfigError
from cramlab.extensions import label, load_class
from cramlab.model import ModelConfig
from cramlab.training.run import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A mixer of the catalog and what changes around it.

    Attributes:
        mixer: name in the catalog.
        model: changed fields of `ModelConfig`.
        training: changed fields of `TrainingConfig`.
        loss: changed fields of `LossConfig`.
    """

    mixer: str
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)

    def configs(self, training: TrainingConfig) -> tuple[ModelConfig, TrainingConfig]:
        """The model, and a training with the variant's changes."""
        mixer = MIXERS[self.mixer]()
        model = ModelConfig(mixer=mixer, n_layers=len(mixer) if isinstance(mixer, tuple) else 1)
        loss = dataclasses.replace(training.loss, **self.loss)
        return dataclasses.replace(model, **self.model), dataclasses.replace(training, loss=loss, **self.training)


# The wider MLP gives "price-only" as many parameters as the semantic memory has.
_AS_LARGE = {"d_mlp": 576}
VARIANTS: dict[str, Variant] = {name: Variant(mixer=name) for name in MIXERS} | {
    # The paper's layer keeps its Add&Norm.
    "cram-paper": Variant(mixer="cram-paper", model={"norm": "post"}),
    # No loss teaches the semantic memory; only the tokens that it answers do.
    "cram-no-consolidation": Variant(mixer="cram", loss={"consolidation_weight": 0.0, "no_read_weight": 0.0}),
    "cram-no-encoding": Variant(mixer="cram", training={"encoding_target": 0.0}),
    # The paper's section on practice curves.
    "cram-fast-semantic": Variant(mixer="cram", training={"semantic_rate": 10.0}),
    "price-only": Variant(mixer="price-only", model=_AS_LARGE),
    # Every token that reads also learns to predict without its read, in ordinary weights.
    "price-only-taught": Variant(mixer="price-only", model=_AS_LARGE, loss={"no_read_floor": 1.0}),
}


def model_of(mixer: str, training: TrainingConfig) -> tuple[ModelConfig, TrainingConfig]:
    """The model of a mixer, which is a name of `VARIANTS` or a reference, and its training.

    Raises:
        ConfigError: when the reference cannot be loaded, or its class builds no layer.
    """
    if mixer in VARIANTS:
        return VARIANTS[mixer].configs(training)
    made = load_class(mixer)()
    if not callable(getattr(made, "build", None)):
        raise ConfigError(f'"{mixer}" has no method build(d_model); see cramlab.mixer.Mixer')
    return ModelConfig(mixer=made), training


def short_name(mixer: str) -> str:
    """The name of a mixer in folders and tables."""
    return mixer if mixer in VARIANTS else label(mixer)
