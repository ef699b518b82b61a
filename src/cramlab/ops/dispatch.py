"""Kernels in Triton: whether they are used, and where they are found.

Each has a slow twin in PyTorch, which is what runs without CUDA. They are custom operators, so that PyTorch's compiler
takes them as they are and neither compiles them again nor breaks its graph.
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
_enabled = os.environ.get("CRAMLAB_FUSED", "1") != "0"  # for a device on which a kernel turns out to be wrong


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Within it, whether kernels are used where they could be."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def usable(x: Tensor) -> bool:
    """Whether kernels can run where x is."""
    return _enabled and x.is_cuda and _HAS_TRITON


def kernels(name: str) -> Any:
    """A module of kernels, imported where they are launched and nowhere else: Triton may be missing."""
    return importlib.import_module(f"cramlab.memory.{name}_kernels")


def known_floats(x: Tensor) -> bool:
    """Whether kernels know the type of these numbers."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def launching(function: Launches) -> Launches:
    """Triton launches on the current device; within the function that is the one of its first argument."""

    @functools.wraps(function)
    def there(x: Tensor, *more: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *more)

    return cast("Launches", there)
