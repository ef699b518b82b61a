"""Initial weights of modules that initialise themselves, in models that transformers builds or loads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def keep_fresh(model: nn.Module) -> None:
    """Marks the modules of a new model as initialised for transformers, except embeddings.

    Modules on the device "meta" are not initialised yet; `reset_missing` does it if the checkpoint lacks them.
    """
    for module in model.modules():
        if not isinstance(module, nn.Embedding) and not any(p.is_meta for p in module.parameters()):
            module._is_hf_initialized = True  # type: ignore[assignment]


@torch.no_grad()
def reset_missing(module: nn.Module) -> None:
    """Initialises the parameters that a checkpoint lacks; loaded parameters stay.

    Raises:
        NotImplementedError: when the module has no `reset_parameters`.
    """
    if all(_is_loaded(parameter) for parameter in module.parameters()):
        return
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        if not all(_is_loaded(parameter) for parameter in module.parameters(recurse=False)):
            raise NotImplementedError(f"{type(module).__name__} has parameters and no reset_parameters")
        return
    loaded = [(parameter, parameter.clone()) for parameter in module.parameters() if _is_loaded(parameter)]
    reset()
    for parameter, value in loaded:
        parameter.copy_(value)


def _is_loaded(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)
