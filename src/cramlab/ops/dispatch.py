"""Which implementation of an operator runs on which device.

Triton kernels run on CUDA and PyTorch everywhere else. The kernels are registered as custom operators, so
`torch.compile` neither compiles them again nor breaks its graph at them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Launches = TypeVar("Launches", bound=Callable[..., Any])
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_enabled = os.environ.get("CRAMLAB_FUSED", "1") != "0"  # to turn off kernels that a device computes wrongly


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Turns the kernels on or off for the duration of a `with` block."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def usable(x: Tensor) -> bool:
    """True if kernels are turned on, Triton is installed and x is on CUDA."""
    return _enabled and x.is_cuda and _HAS_TRITON


def kernels(operator: str, module: str = "kernels") -> Any:
    """The kernels in an operator's folder, imported when they are first launched, since Triton may be missing."""
    return importlib.import_module(f"cramlab.ops.{operator}.{module}")


def known_floats(x: Tensor) -> bool:
    """True if the kernels support the type of x."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def launching(function: Launches) -> Launches:
    """Makes the device of the function's first argument current: Triton launches on the current device."""

    @functools.wraps(function)
    def there(x: Tensor, *more: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *more)

    return cast("Launches", there)


def few_launches(device: torch.device) -> bool:
    """True on accelerators, where saving kernel launches and synchronisation outweighs some redundant compute."""
    return device.type != "cpu"
