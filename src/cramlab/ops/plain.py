"""Decides whether a computation may use a module's parameters directly instead of calling the module."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling the module runs the forward of `kind` on the module's own parameters and nothing else.

    False if an adapter (LoRA), a quantisation, a parametrisation, a hook or an offloading wraps it.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return False
    forward_hooks = module._forward_hooks or module._forward_pre_hooks
    return not (forward_hooks or module._backward_hooks or module._backward_pre_hooks)
