"""A causal language model of CRAM layers with the interface of transformers: model, cache, training.

`CRAMForCausalLM` and `CRAMForCausalLMConfig` are imported when they are first used, since they import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cramlab.language_model.configuration import CRAMForCausalLMConfig
    from cramlab.language_model.modeling import CRAMForCausalLM

__all__ = ["CRAMForCausalLM", "CRAMForCausalLMConfig"]
_MODULES = {"CRAMForCausalLM": "modeling", "CRAMForCausalLMConfig": "configuration"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
