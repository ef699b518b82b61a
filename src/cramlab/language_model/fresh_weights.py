"""Weights of modules that initialise themselves, in transformers' life of a model: fresh, loaded, or lacking."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def keep_fresh(model: nn.Module) -> None:
    """Tells transformers that the modules of a model just built, embeddings aside, have initialised themselves.

    On the device "meta" they have not, and are left to `reset_missing` where a checkpoint does not fill them.
    """
    for module in model.modules():
        if not isinstance(module, nn.Embedding) and not any(p.is_meta for p in module.parameters()):
            module._is_hf_initialized = True  # type: ignore[assignment]


@torch.no_grad()
def reset_missing(module: nn.Module) -> None:
    """Gives those parameters that a checkpoint lacks the values of a new module; what was loaded stays.

    Raises:
        NotImplementedError: for parameters that nothing initialises.
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
