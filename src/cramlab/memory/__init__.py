"""The method of the paper: three memories, consolidation between them, and routers that choose among them."""

from cramlab.memory.delta import DeltaMemoryConfig
from cramlab.memory.episodic import EpisodicMemoryConfig
from cramlab.memory.layer import CRAMConfig, CRAMLayer, CRAMState
from cramlab.memory.router import RouterConfig
from cramlab.memory.semantic import AdapterConfig, NothingConfig, SlotsConfig
from cramlab.memory.working import WorkingMemoryConfig
from cramlab.memory.working_layer import WorkingLayer, WorkingLayerConfig

__all__ = [
    "AdapterConfig",
    "CRAMConfig",
    "CRAMLayer",
    "CRAMState",
    "DeltaMemoryConfig",
    "EpisodicMemoryConfig",
    "NothingConfig",
    "RouterConfig",
    "SlotsConfig",
    "WorkingLayer",
    "WorkingLayerConfig",
    "WorkingMemoryConfig",
]
