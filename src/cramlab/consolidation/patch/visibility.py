"""Which keys each query of a call may see, derived from the attention mask that transformers passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cramlab.errors import ConsolidationError

# A key is hidden when less than this is added to its score; masks use -1e4, -1e9 or the least number of a type.
_HIDDEN = -9e3


class Padding(NamedTuple):
    """Causal attention where each sequence is one run of visible keys, with padding before it, after it, or both.

    Attributes:
        visible: whether a key is visible, bool (B, S).
        first: position of each sequence's first visible key, int64 (B,).
    """

    visible: Tensor
    first: Tensor

    def n_keys(self, start: int) -> Tensor:
        """Number of keys that each token sees, itself included, int64 (B, T); 0 for padding."""
        places = torch.arange(start, self.visible.shape[1], device=self.visible.device)[None]
        return (places - self.first[:, None] + 1) * self.visible[:, start:]


class Mask(NamedTuple):
    """Any other causal mask: with holes or blocks, or different from token to token or from head to head.

    Attributes:
        allowed: whether a query sees a key, bool (B, H or 1, T, S).
        bias: numbers added to the scores, (B, H or 1, T, S); None: none.
        own: whether a token sees itself, bool (B, T); the others are padding, for which the original's output is kept.
    """

    allowed: Tensor
    bias: Tensor | None
    own: Tensor

    def n_keys(self) -> Tensor:
        """Number of keys that each token sees, itself included, int64 (B, T); 0 for padding."""
        return self.seen().sum(-1) * self.own

    def seen(self) -> Tensor:
        """Whether any head of a query sees a key, bool (B, T, S)."""
        return self.allowed.any(dim=1)

    def near(self, tokens: slice, window: int, n_sinks: int) -> tuple[Tensor, Tensor]:
        """Window and first keys of some tokens, counted among the keys that each token sees.

        Returns:
            Whether a key is in the window and whether it is a first key, bool (B, H or 1, N, S) each; never both.
        """
        seen = self.seen()[:, tokens]
        rank = seen.cumsum(dim=-1)
        sinks = seen & (rank <= n_sinks)
        near = seen & (rank > rank[..., -1:] - window) & ~sinks
        allowed = self.allowed[:, :, tokens]
        return near[:, None] & allowed, sinks[:, None] & allowed


Visibility = Padding | Mask | None  # None: every token sees all earlier keys and itself


def visibility(mask: Tensor | None, n_batch: int, n_heads: int, n_tokens: int, start: int) -> Visibility:
    """Analyses a mask.

    Args:
        mask: True (or 0) where a key is seen, False (or below -9000) where it is hidden; other numbers are added to
            the scores. Bool or floating (B or 1, H or 1, T, S'), S' at least `start + n_tokens`; None: attention is
            causal and nothing is hidden.
        n_batch: number of sequences, B.
        n_heads: number of query heads, H.
        n_tokens: number of queries, T.
        start: position of the first query among the keys. Keys from `start + n_tokens` on are not written yet.

    Returns:
        Which of the first `start + n_tokens` keys, S, the queries see.

    Raises:
        ConsolidationError: when the mask has another shape or type, or lets a token see later ones.
    """
    if mask is None:
        return None
    n_keys = start + n_tokens
    fits = mask.ndim == 4 and mask.shape[0] in (1, n_batch) and mask.shape[1] in (1, n_heads)
    if not fits or mask.shape[2] != n_tokens or mask.shape[3] < n_keys:
        raise ConsolidationError(
            f"attention_mask has shape {tuple(mask.shape)}; give (batch, keys), or (batch or 1, heads or 1, tokens, "
            f"keys), here ({n_batch}, {n_heads}, {n_tokens}, {n_keys}): {n_tokens} tokens after {start} in the cache"
        )
    allowed, bias = _parts(mask.expand(n_batch, -1, -1, -1))
    places = torch.arange(mask.shape[3], device=mask.device)
    own = torch.arange(start, n_keys, device=mask.device)
    if bool((allowed & (places > own[:, None])).any()):
        raise ConsolidationError(
            "attention_mask lets a token see later ones; a consolidated model must be causal: give a causal mask, or "
            "remove the consolidation with remove(model)"
        )
    allowed = allowed[..., :n_keys]
    if allowed.shape[1] > 1 and bool((allowed == allowed[:, :1]).all()):
        allowed = allowed[:, :1]
    if bias is None and allowed.shape[1] == 1 and (runs := _runs(allowed[:, 0], own)) is not None:
        return None if bool(runs.visible.all()) else runs
    seen = allowed.any(dim=1)
    diagonal = seen.diagonal(offset=start, dim1=1, dim2=2)
    return Mask(allowed, None if bias is None else bias[..., :n_keys], diagonal)


def _parts(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a mask lets a query see a key, and what it adds to the scores (None: nothing)."""
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise ConsolidationError(
            f"attention_mask has four dimensions and type {mask.dtype}; give bool (True: seen) or a floating type "
            "(added to the scores)"
        )
    allowed = mask >= _HIDDEN
    bias = mask.masked_fill(~allowed, 0.0)
    return allowed, bias if bool(bias.any()) else None


def _runs(allowed: Tensor, own: Tensor) -> Padding | None:
    """A mask (B, T, S) as padding; None when it is more than causality and padding."""
    visible = allowed[:, -1]
    places = torch.arange(visible.shape[1], device=visible.device)
    if not bool((allowed == (visible[:, None] & (places <= own[:, None]))).all()):
        return None
    first = visible.int().argmax(dim=1)
    ended = visible.cumsum(dim=1) == visible.sum(dim=1, keepdim=True)
    run = (places >= first[:, None]) & (~ended | visible)
    return Padding(visible, first) if bool((run == visible).all()) else None


def n_keys_seen(seen: Visibility, n_batch: int, n_tokens: int, start: int, device: torch.device) -> Tensor:
    """Number of keys that each token sees, itself included, int64 (B, T); 0 for padding."""
    if seen is None:
        return torch.arange(start + 1, start + n_tokens + 1, device=device).expand(n_batch, -1)
    return (seen.n_keys() if isinstance(seen, Mask) else seen.n_keys(start)).expand(n_batch, -1)
