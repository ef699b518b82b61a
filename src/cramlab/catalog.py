"""Every mixer by name. `experiments.variants` adds names for mixers that are trained in another way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cramlab.baselines import (
    MemorizerConfig,
    MixtureOfDepthsConfig,
    RecurrenceConfig,
    SeqBoatConfig,
    SlidingWindowConfig,
    TransformerConfig,
    TransMambaConfig,
    jamba,
)
from cramlab.memory import AdapterConfig, CRAMConfig, DeltaMemoryConfig, NothingConfig, RouterConfig, SlotsConfig
from cramlab.mixer import MixerConfig

CRAM_RATE = 0.015  # share of tokens that a trained CRAM reads on SRCD, for the router that reads at random


def _cram(**changes: object) -> Callable[[], MixerConfig]:
    return lambda: dataclasses.replace(CRAMConfig(), **changes)  # type: ignore[arg-type]


MIXERS: dict[str, Callable[[], MixerConfig | tuple[MixerConfig, ...]]] = {
    "cram": CRAMConfig,
    "cram-paper": CRAMConfig.paper,
    "cram-delta": _cram(working=DeltaMemoryConfig()),
    # Routers that do not learn.
    "cram-always": _cram(router=RouterConfig(name="always")),
    "cram-never": _cram(router=RouterConfig(name="never")),
    "cram-oracle": _cram(router=RouterConfig(name="oracle")),
    "cram-random": _cram(router=RouterConfig(name="random", random_frac=CRAM_RATE)),
    # Ablations.
    "cram-no-working": _cram(working=None),
    "cram-low-rank": _cram(semantic=AdapterConfig(rank=None)),
    "cram-slots": _cram(semantic=SlotsConfig()),
    "cram-gumbel": _cram(router=RouterConfig(name="gumbel", d_hidden=32)),
    "price-only": _cram(semantic=NothingConfig()),
    # Mixers from the literature.
    "transformer": TransformerConfig,
    "sliding-window": SlidingWindowConfig,
    "recurrence": RecurrenceConfig,
    "jamba": jamba,
    "hybrid": lambda: (RecurrenceConfig(), TransformerConfig()),
    "delta-rule": _cram(working=DeltaMemoryConfig(), router=RouterConfig(name="never")),
    "seqboat": SeqBoatConfig,
    "transmamba": TransMambaConfig,
    "mixture-of-depths": MixtureOfDepthsConfig,
    "memorizer": MemorizerConfig,
}
