"""Whether the values of tensors are checked, for which the host waits for the device; who knows them skips it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_known = ContextVar("_known", default=False)


@contextmanager
def values_known() -> Iterator[None]:
    """Skips checks of values in a `with` block, whose caller has checked them where they were made."""
    token = _known.set(True)
    try:
        yield
    finally:
        _known.reset(token)


def checks_values() -> bool:
    """Whether values are checked: not in compiled code, and not in a block of `values_known`."""
    return not torch.compiler.is_compiling() and not _known.get()
