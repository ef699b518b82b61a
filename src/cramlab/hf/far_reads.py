"""Attention in two parts: a window with the first few tokens for everyone, the whole cache for those that read.

Nothing is masked away that could be left out: the window is scored in bands, readers are gathered, and the far part of
the cache is not touched when nobody reads. Source: ours; window and first tokens as in StreamingLLM (Xiao et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_NEVER = -1e30  # a score that no softmax notices and no gradient turns into NaN
_LEAST_MASS = -50.0
READERS_AT_ONCE = 128


class Padding(NamedTuple):
    """Which keys are real, in a batch with padding.

    Attributes:
        visible: bool (B, S).
        first: place of each sequence's first real key, int64 (B,).
    """

    visible: Tensor
    first: Tensor

    @classmethod
    def of(cls, mask: Tensor | None) -> Padding | None:
        """From a causal mask with padding, bool (B, 1, T, S); None when there is nothing to hide.

        Raises:
            ValueError: for a mask that is more than causality and padding.
        """
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            raise ValueError(f"attention mask {tuple(mask.shape)} of {mask.dtype} is no mask of tokens; give 2-D masks")
        visible = mask[:, 0, -1]
        own = mask[:, 0].diagonal(offset=mask.shape[3] - mask.shape[2], dim1=1, dim2=2)
        if bool((own & ~visible[:, -own.shape[1] :]).any()):
            raise ValueError("packed sequences share a row; give one sequence a row, padded")
        if bool(visible.all()):
            return None
        return cls(visible, visible.int().argmax(dim=1))


class WindowRead(NamedTuple):
    """What the window said.

    Attributes:
        heads: (B, T, H, D).
        masses: log of the sum of exponentiated scores, of the window and of the first tokens, (B, T, 2 H).
        n_scored: pairs of query and key that were scored, for one head.
    """

    heads: Tensor
    masses: Tensor
    n_scored: int


def has_far(n_tokens: int, n_keys: int, window: int, n_sinks: int, padding: Padding | None, like: Tensor) -> Tensor:
    """The tokens that have something to read beyond window and first tokens, bool (B, T) or (1, T)."""
    places = torch.arange(n_keys - n_tokens, n_keys, device=like.device)[None]
    first = 0 if padding is None else padding.first[:, None]
    return places - first >= window + n_sinks


def window_read(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, n_sinks: int, scale: float, padding: Padding | None
) -> WindowRead:
    """Attention to the last `window` keys (itself included) and the first `n_sinks`.

    Args:
        query: the newest tokens, (B, H, T, D).
        key: (B, H / G, S, D); query t sits at place S - T + t.
        value: likewise.
        window: keys, at least 1.
        n_sinks: first keys of the sequence that every token sees.
        scale: of the scores.
        padding: see there.
    """
    n_batch, n_heads, n_tokens, d_head = query.shape
    n_groups, n_keys = key.shape[1], key.shape[2]
    if n_tokens == 1 and padding is None and n_keys >= window + n_sinks:
        return _one_token(query, key, value, window, n_sinks, scale)
    start = n_keys - n_tokens
    low = max(0, start - window + 1)
    rows = min(window, n_tokens)  # queries a block
    n_blocks = -(-n_tokens // rows)
    front, back = window - 1 - (start - low), n_blocks * rows - n_tokens

    def banded(entries: Tensor) -> Tensor:
        """(B, Hk, blocks, D, rows + window - 1)."""
        padded = F.pad(entries[:, :, low:], (0, 0, front, back)) if front or back else entries[:, :, low:]
        return padded.unfold(2, rows + window - 1, rows)

    queries = F.pad(query, (0, 0, 0, back)).view(n_batch, n_groups, -1, n_blocks, rows, d_head)
    queries = queries.transpose(2, 3).flatten(3, 4)  # (B, Hk, blocks, G rows, D)
    sink_places = torch.arange(min(n_sinks, n_keys), device=query.device)[None]
    if padding is None:
        sink_keys, sink_values = (entries[:, :, : sink_places.shape[1]] for entries in (key, value))
    else:
        sink_places = sink_places + padding.first[:, None]
        index = sink_places.clamp(max=n_keys - 1)[:, None, :, None].expand(-1, n_groups, -1, d_head)
        sink_keys, sink_values = key.gather(2, index), value.gather(2, index)

    near_ok, sinks_ok = _allowed(start, rows, n_blocks, window, n_sinks, n_keys, sink_places, padding)
    precise = torch.promote_types(query.dtype, torch.float32)
    near = (queries @ banded(key)).to(precise) * scale
    sinks = (queries @ sink_keys[:, :, None].transpose(-1, -2)).to(precise) * scale
    near, sinks = (
        s.unflatten(3, (-1, rows)).masked_fill(~ok[:, None, :, None], _NEVER)
        for s, ok in ((near, near_ok), (sinks, sinks_ok))
    )  # (B, Hk, blocks, G, rows, keys)
    weights = torch.cat([near, sinks], dim=-1).softmax(dim=-1).to(value.dtype).flatten(3, 4)
    n_near = near.shape[-1]
    heads = weights[..., :n_near] @ banded(value).transpose(-1, -2)
    heads = heads + weights[..., n_near:] @ sink_values[:, :, None]
    heads = heads.unflatten(3, (-1, rows)).transpose(2, 3).reshape(n_batch, n_heads, -1, d_head)
    masses = torch.stack([part.logsumexp(dim=-1) for part in (near, sinks)])  # (2, B, Hk, blocks, G, rows)
    masses = masses.clamp(min=_LEAST_MASS).transpose(3, 4).reshape(2, n_batch, n_heads, -1)
    return WindowRead(
        heads=heads[:, :, :n_tokens].transpose(1, 2),
        masses=masses[..., :n_tokens].permute(1, 3, 0, 2).flatten(2).to(query.dtype),
        n_scored=n_batch * n_blocks * rows * (n_near + sinks.shape[-1]),
    )


def _one_token(query: Tensor, key: Tensor, value: Tensor, window: int, n_sinks: int, scale: float) -> WindowRead:
    """`window_read` in decoding: all keys of window and first tokens are seen, so there is nothing to mask."""
    keys, values = (
        torch.cat([entries[:, :, :n_sinks], entries[:, :, entries.shape[2] - window :]], dim=2)
        for entries in (key, value)
    )
    scores = query.unflatten(1, (key.shape[1], -1)).squeeze(3) @ keys.transpose(-1, -2)  # (B, Hk, G, keys)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scale
    heads = (scores.softmax(dim=-1).to(value.dtype) @ values).flatten(1, 2)[:, None]
    parts = scores[..., n_sinks:], scores[..., :n_sinks]
    masses = [part.logsumexp(dim=-1).clamp(min=_LEAST_MASS).flatten(1) for part in parts]
    return WindowRead(heads, torch.cat(masses, dim=-1)[:, None].to(query.dtype), len(query) * scores.shape[-1])


def _allowed(
    start: int,
    rows: int,
    n_blocks: int,
    window: int,
    n_sinks: int,
    n_keys: int,
    sink_places: Tensor,
    padding: Padding | None,
) -> tuple[Tensor, Tensor]:
    """Which keys of the band, and which first keys, each query sees: bool (B or 1, blocks, rows, keys)."""
    device = sink_places.device
    own = start + torch.arange(n_blocks * rows, device=device).view(n_blocks, rows, 1)
    places = own[:, :1] - (window - 1) + torch.arange(rows + window - 1, device=device)  # (blocks, 1, keys)
    near = (places <= own) & (places > own - window) & (places >= 0)
    if padding is None:
        near = (near & (places >= n_sinks))[None]
    else:
        seen = padding.visible[:, places.clamp(0, n_keys - 1)]
        near = near & seen & (places >= padding.first[:, None, None, None] + n_sinks)
    return near, sink_places[:, None, None] <= own


def far_read(
    query: Tensor, key: Tensor, value: Tensor, reads: Tensor, *, scale: float, padding: Padding | None
) -> tuple[Tensor, int]:
    """The full causal attention of the tokens that read.

    Args:
        query: (B, H, T, D).
        key: (B, H / G, S, D).
        value: likewise.
        reads: bool (B, T).
        scale: of the scores.
        padding: see there.

    Returns:
        Heads of the readers in the order of `reads.nonzero()`, (N, H, D), and the pairs scored, for one head. Readers
        go in blocks, each scored against the keys up to its last reader.
    """
    start = key.shape[2] - query.shape[2]
    answers, n_scored = [], 0
    for b, row in enumerate(reads):
        for tokens in row.nonzero().squeeze(1).split(READERS_AT_ONCE):
            if not len(tokens):
                continue
            n_seen = start + int(tokens[-1]) + 1
            places = torch.arange(n_seen, device=key.device)
            mask = places <= start + tokens[:, None]
            if padding is not None:
                mask = mask & padding.visible[b, :n_seen]
            n_scored += mask.numel()
            packed = query[b].index_select(1, tokens).unflatten(0, (key.shape[1], -1))  # (Hk, G, n, D)
            heads = F.scaled_dot_product_attention(
                packed.flatten(1, 2)[None],
                key[b : b + 1, :, :n_seen],
                value[b : b + 1, :, :n_seen],
                attn_mask=None if bool(mask.all()) else mask.repeat(packed.shape[1], 1),
                scale=scale,
            )[0]
            answers.append(heads.unflatten(1, (-1, len(tokens))).flatten(0, 1).transpose(0, 1))
    if not answers:
        return query.new_zeros(0, query.shape[1], query.shape[3]), 0
    return torch.cat(answers), n_scored
