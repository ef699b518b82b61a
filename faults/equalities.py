"""Equalities: what must not matter, does not. Padding, batch, cache, step and packing change nothing; nothing leaks.

Layers and language models of ours are compared in float64, where rounding hides nothing; patched models in float32,
and in bfloat16 where both sides do the same sums. A computation that the library refuses in words holds too.
"""

from __future__ import annotations

from collections.abc import Iterator

from faults import equal_layers, equal_models, equal_patches
from faults.cases import Case


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """Layers, language models of ours, and patched models."""
    for module in (equal_layers, equal_models, equal_patches):
        yield from module.cases(seed, share)
