"""Every mixer that a command can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cramlab.baselines import TransformerConfig
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.mixer import MixerConfig


def _cram_with(router: RouterConfig) -> MixerConfig:
    return dataclasses.replace(CRAMConfig(), router=router)


MIXERS: dict[str, Callable[[], MixerConfig]] = {
    "cram": CRAMConfig,
    "cram-paper": CRAMConfig.paper,
    "cram-always": lambda: _cram_with(RouterConfig(name="always")),
    "cram-never": lambda: _cram_with(RouterConfig(name="never")),
    "cram-oracle": lambda: _cram_with(RouterConfig(name="oracle")),
    "cram-random": lambda: _cram_with(RouterConfig(name="random")),
    "transformer": TransformerConfig,
}
