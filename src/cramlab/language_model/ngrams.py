"""How familiar a token is: whether its trigram stood before in the window, and how often its n-gram occurs in training.

The n-gram of a token is the token and the n - 1 tokens before it. All results have an entry for each target, that is
each token of a window (N, T) but the first: (N, T - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BITS = 20  # three tokens fit an int64
_CHUNK = 2**22


def repeated(windows: Tensor) -> Tensor:
    """Whether the trigram of each target stood before in its window, bool (N, T - 1); false at the first target.

    Args:
        windows: token ids below 2^20, int64 (N, T).
    """
    ordered, order = _codes(windows, 3).sort(dim=1, stable=True)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return F.pad(torch.zeros_like(same).scatter(1, order, same), (1, 0))


def training_counts(stream: Tensor, windows: Tensor, n: int, device: str | torch.device = "cpu") -> Tensor:
    """How often the n-gram of each target occurs in a stream of tokens, int64 (N, T - 1); -1 where it has none.

    Only the n-grams of the windows are counted, so no table of all n-grams is made.

    Args:
        stream: token ids below 2^20, any integer type (M,); may be mapped into memory.
        windows: token ids, int64 (N, T).
        n: 1, 2 or 3.
        device: where to count.
    """
    wanted, place = torch.unique(_codes(windows.to(device), n), return_inverse=True)
    totals = torch.zeros(len(wanted), dtype=torch.int64, device=device)
    for first in range(0, len(stream) - n + 1, _CHUNK):
        codes = _codes(stream[first : first + _CHUNK + n - 1].long().to(device)[None], n)[0]
        index = torch.searchsorted(wanted, codes).clamp(max=len(wanted) - 1)
        totals += torch.bincount(index[wanted[index] == codes], minlength=len(wanted))
    counts = totals[place].cpu()
    return counts[:, 1:] if n == 1 else F.pad(counts, (n - 2, 0), value=-1)


def _codes(tokens: Tensor, n: int) -> Tensor:
    """One number for each n-gram, int64 (N, T - n + 1)."""
    length = tokens.shape[1] - n + 1
    codes = tokens[:, :length]
    for i in range(1, n):
        codes = (codes << _BITS) | tokens[:, i : i + length]
    return codes
