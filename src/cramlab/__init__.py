"""cramlab: how much of a model's attention is really needed, and can it learn to need less?

The names below are what most users need. Each is imported when it is first used, so that `import cramlab` takes no
time. Other names are in the packages: tasks in `cramlab.tasks`, the method in `cramlab.memory`, training in
`cramlab.training`, experiments in `cramlab.experiments`. The Auto classes of transformers load the library's language
models once cramlab has been imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from cramlab import moved
from cramlab.language_model import auto

if TYPE_CHECKING:
    from cramlab.batch import Batch, InputSpec, Predictions
    from cramlab.language_model.configuration import CRAMForCausalLMConfig
    from cramlab.language_model.modeling import CRAMForCausalLM
    from cramlab.memory import CRAMConfig, CRAMLayer
    from cramlab.metrics import score
    from cramlab.mixer import Cost, Mixer, MixerOutput, Routing
    from cramlab.model import ModelConfig, SequenceModel
    from cramlab.pretrained import audit, consolidate, guard, load_consolidated, load_pretrained, skip_counts
    from cramlab.sharing import Consolidation
    from cramlab.tasks.srcd import SRCDConfig
    from cramlab.training import train

__all__ = [
    "Batch",
    "CRAMConfig",
    "CRAMForCausalLM",
    "CRAMForCausalLMConfig",
    "CRAMLayer",
    "Consolidation",
    "Cost",
    "InputSpec",
    "Mixer",
    "MixerOutput",
    "ModelConfig",
    "Predictions",
    "Routing",
    "SRCDConfig",
    "SequenceModel",
    "audit",
    "consolidate",
    "guard",
    "load_consolidated",
    "load_pretrained",
    "score",
    "skip_counts",
    "train",
]

_MODULES = {
    "batch": ("Batch", "InputSpec", "Predictions"),
    "language_model.configuration": ("CRAMForCausalLMConfig",),
    "language_model.modeling": ("CRAMForCausalLM",),
    "memory": ("CRAMConfig", "CRAMLayer"),
    "metrics": ("score",),
    "mixer": ("Cost", "Mixer", "MixerOutput", "Routing"),
    "model": ("ModelConfig", "SequenceModel"),
    "pretrained": ("audit", "consolidate", "guard", "load_consolidated", "load_pretrained", "skip_counts"),
    "sharing": ("Consolidation",),
    "tasks.srcd": ("SRCDConfig",),
    "training": ("train",),
}
_MODULE_OF = {name: f"cramlab.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module of the package, when it is first used."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"cramlab.{name}") is not None:
        return importlib.import_module(f"cramlab.{name}")
    return moved.attribute("cramlab", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto.register()
moved.register()
