"""The method: three memories, consolidation between them, and the routers that choose."""

from cramlab.memory.episodic import EpisodicMemoryConfig
from cramlab.memory.layer import CRAMConfig, CRAMLayer, CRAMState
from cramlab.memory.router import RouterConfig
from cramlab.memory.semantic import AdapterConfig, NothingConfig, SlotsConfig
from cramlab.memory.working import WorkingMemoryConfig

__all__ = [
    "AdapterConfig",
    "CRAMConfig",
    "CRAMLayer",
    "CRAMState",
    "EpisodicMemoryConfig",
    "NothingConfig",
    "RouterConfig",
    "SlotsConfig",
    "WorkingMemoryConfig",
]
