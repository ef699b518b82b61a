"""Repeats planted in learning contexts, so that gates learn to read where a text copies from its far past.

Ordinary text copies rarely, so its mean loss hardly shows a gate that skips the reads of a copy. Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST, LONGEST = 8, 32  # tokens of a repeat
_APART = 512  # one repeat for this many tokens of a context


def planted(tokens: Tensor, frac: float, n_near: int, generator: torch.Generator) -> Tensor:
    """Contexts with repeats, (B, T): a span overwrites a place in the first half and another in the second.

    Half of the spans are those of the context itself, which stay in place; the others come from a random context of the
    batch, so nothing but the first half foretells them.

    Args:
        tokens: contexts, (B, T).
        frac: probability that a context gets repeats; too short ones stay as they are.
        n_near: number of keys that every token attends to; the halves of a repeat are farther apart.
        generator: source of all choices, on the CPU.
    """
    n_batch, n_tokens = tokens.shape
    out = tokens.clone()

    def draw(low: int, high: int) -> int:
        """A whole number from `low` to below `high`."""
        return int(torch.randint(low, high, (1,), generator=generator))

    half = n_tokens // 2
    if n_tokens - half < 2 * LONGEST or half <= n_near + LONGEST:
        return out
    for row in range(n_batch):
        if float(torch.rand(1, generator=generator)) >= frac:
            continue
        for _ in range(max(1, n_tokens // _APART)):
            n = draw(SHORTEST, LONGEST + 1)
            early, late = draw(0, half - n - n_near), draw(half, n_tokens - n)
            if draw(0, 2):
                source = draw(0, n_tokens - n)
                out[row, early : early + n] = tokens[draw(0, n_batch), source : source + n]
            out[row, late : late + n] = out[row, early : early + n]
    return out
