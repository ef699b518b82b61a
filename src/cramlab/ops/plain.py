"""The one question that a shortcut around a module's forward has to ask: is there more to the module than its class?"""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs the forward of `kind` on parameters of its own, and nothing else.

    It is not when an adapter (LoRA), a quantisation, a parametrisation, a hook or an offloading has wrapped it.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return False
    forward_hooks = module._forward_hooks or module._forward_pre_hooks
    return not (forward_hooks or module._backward_hooks or module._backward_pre_hooks)
