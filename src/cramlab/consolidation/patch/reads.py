"""Attention in two parts: every token attends to a window and the first few keys, readers attend to all earlier keys.

Skipped pairs are not computed: the window is scored in bands, readers are gathered, and without a reader the far part
of the cache is not touched. Only under a mask that is more than causality and padding (`visibility.Mask`) is every pair
scored. Source: ours; window and first keys as in StreamingLLM (Xiao et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.consolidation.patch.visibility import Mask, Padding, Visibility

_NEVER = -1e30  # score of a hidden key: its weight is 0, and finite numbers keep gradients free of NaN
LEAST_MASS = -50.0
READERS_AT_ONCE = 128


class Scoring(NamedTuple):
    """The map from products of queries and keys to attention scores.

    Attributes:
        scale: factor of the products.
        softcap: bound c in c * tanh(score / c), applied to the scores (Gemma 2); None: not applied.
        sinks: score of a key without a value by head, (H,), which takes weight from the others (gpt-oss); None: none.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """Scores of the same shape, in at least 32 bits."""
        scores = products.to(torch.promote_types(products.dtype, torch.float32)) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    @property
    def plain(self) -> bool:
        """Whether PyTorch's own attention can be used."""
        return self.softcap is None and self.sinks is None

    def weights(self, scores: Tensor, *by_head: int) -> Tensor:
        """Softmax over the last dimension of scores; `by_head` is the shape that lays one number a head beside them."""
        if self.sinks is None:
            return scores.softmax(dim=-1)
        sinks = self.sinks.to(scores.dtype).view(by_head).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


class WindowRead(NamedTuple):
    """Attention to the window and the first keys.

    Attributes:
        heads: outputs of the heads, (B, T, H, D).
        masses: log-sum-exp of the scores, over the window and over the first keys, (B, T, 2 H), in at least 32 bits,
            as gates depend on small differences.
        n_scored: number of pairs of query and key that were scored, for one head.
    """

    heads: Tensor
    masses: Tensor
    n_scored: int


def window_read(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, n_sinks: int, scoring: Scoring, seen: Visibility
) -> WindowRead:
    """Attention of every token to the last `window` keys (itself included) and the first `n_sinks`.

    Args:
        query: queries of the newest tokens, (B, H, T, D).
        key: (B, H / G, S, D); query t has position S - T + t.
        value: (B, H / G, S, Dv).
        window: number of keys, at least 1.
        n_sinks: number of first keys that every token attends to.
        scoring: maps products to scores.
        seen: which keys are visible; hidden keys do not count.
    """
    n_batch, n_heads, n_tokens, d_head = query.shape
    n_groups, n_keys = key.shape[1], key.shape[2]
    if isinstance(seen, Mask):
        return _under_mask(query, key, value, window, n_sinks, scoring, seen)
    if n_tokens == 1 and seen is None and n_keys >= window + n_sinks:
        return _one_token(query, key, value, window, n_sinks, scoring)
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
    if seen is None:
        sink_keys, sink_values = (entries[:, :, : sink_places.shape[1]] for entries in (key, value))
    else:
        sink_places = sink_places + seen.first[:, None]
        index = sink_places.clamp(max=n_keys - 1)[:, None, :, None]
        sink_keys, sink_values = (e.gather(2, index.expand(-1, n_groups, -1, e.shape[3])) for e in (key, value))

    near_ok, sinks_ok = _allowed(start, rows, n_blocks, window, n_sinks, n_keys, sink_places, seen)
    near = scoring(queries @ banded(key))
    sinks = scoring(queries @ sink_keys[:, :, None].transpose(-1, -2))
    near, sinks = (
        s.unflatten(3, (-1, rows)).masked_fill(~ok[:, None, :, None], _NEVER)
        for s, ok in ((near, near_ok), (sinks, sinks_ok))
    )  # (B, Hk, blocks, G, rows, keys)
    (near_weights, near_mass), (sink_weights, sink_mass) = _softmax(near), _softmax(sinks)
    masses = torch.cat([near_mass, sink_mass], dim=-1)  # (B, Hk, blocks, G, rows, 2)
    near_heads = near_weights.to(value.dtype).flatten(3, 4) @ banded(value).transpose(-1, -2)
    sink_heads = sink_weights.to(value.dtype).flatten(3, 4) @ sink_values[:, :, None]
    shares = scoring.weights(masses, n_groups, 1, n_heads // n_groups, 1, 1)
    near_share, sink_share = shares.flatten(3, 4).split(1, dim=-1)
    heads = (near_share * near_heads + sink_share * sink_heads).to(value.dtype).unflatten(3, (-1, rows))
    heads = heads.transpose(2, 3).reshape(n_batch, n_heads, -1, value.shape[3])
    masses = masses.clamp(min=LEAST_MASS).transpose(2, 3).reshape(n_batch, n_heads, -1, 2)
    return WindowRead(
        heads=heads[:, :, :n_tokens].transpose(1, 2),
        masses=masses[:, :, :n_tokens].permute(0, 2, 3, 1).flatten(2),
        n_scored=n_batch * n_blocks * rows * (near.shape[-1] + sinks.shape[-1]),
    )


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of scores (..., keys) and their log-sum-exp, (..., 1); `_NEVER` without keys.

    The log-sum-exp is that of the largest score and its weight: `logsumexp` is slow on a CPU where keys are hidden.
    """
    weights = scores.softmax(dim=-1)
    if not scores.shape[-1]:
        return weights, scores.new_full((*scores.shape[:-1], 1), _NEVER)
    top, at = scores.max(dim=-1, keepdim=True)
    return weights, top - weights.gather(-1, at).log()


def _under_mask(
    query: Tensor, key: Tensor, value: Tensor, window: int, n_sinks: int, scoring: Scoring, seen: Mask
) -> WindowRead:
    """`window_read` that scores every pair, one block of queries after another; for masks that no band fits."""
    n_batch, n_heads, n_tokens, _ = query.shape
    shared = n_heads // key.shape[1]
    keys, values = (entries.repeat_interleave(shared, dim=1) for entries in (key, value))
    heads, masses = [], []
    for begin in range(0, n_tokens, READERS_AT_ONCE):
        tokens = slice(begin, begin + READERS_AT_ONCE)
        scores = scoring(query[:, :, tokens] @ keys.transpose(-1, -2))
        if seen.bias is not None:
            scores = scores + seen.bias[:, :, tokens]
        near, sinks = seen.near(tokens, window, n_sinks)
        weights = scoring.weights(scores.masked_fill(~(near | sinks), _NEVER), n_heads, 1, 1).to(value.dtype)
        heads.append((weights @ values).transpose(1, 2))
        parts = [_softmax(scores.masked_fill(~ok, _NEVER))[1].squeeze(-1) for ok in (near, sinks)]
        masses.append(torch.cat(parts, dim=1).clamp(min=LEAST_MASS).transpose(1, 2))
    n_scored = n_batch * n_tokens * key.shape[2]
    return WindowRead(torch.cat(heads, dim=1), torch.cat(masses, dim=1), n_scored)


def _one_token(query: Tensor, key: Tensor, value: Tensor, window: int, n_sinks: int, scoring: Scoring) -> WindowRead:
    """`window_read` in decoding: all keys of the window and the first keys are visible, so nothing is masked."""
    keys, values = (
        torch.cat([entries[:, :, :n_sinks], entries[:, :, entries.shape[2] - window :]], dim=2)
        for entries in (key, value)
    )
    products = query.unflatten(1, (key.shape[1], -1)).squeeze(3) @ keys.transpose(-1, -2)  # (B, Hk, G, keys)
    scores = scoring(products)
    weights = scoring.weights(scores, key.shape[1], scores.shape[2], 1)
    heads = (weights.to(value.dtype) @ values).flatten(1, 2)[:, None]
    parts = scores[..., n_sinks:], scores[..., :n_sinks]
    masses = torch.cat([_softmax(part)[1].flatten(1) for part in parts], dim=-1).clamp(min=LEAST_MASS)
    return WindowRead(heads, masses[:, None], len(query) * scores.shape[-1])


def _allowed(
    start: int,
    rows: int,
    n_blocks: int,
    window: int,
    n_sinks: int,
    n_keys: int,
    sink_places: Tensor,
    seen: Padding | None,
) -> tuple[Tensor, Tensor]:
    """Which keys of the band and which first keys each query sees, bool (B or 1, blocks, rows, keys) each."""
    device = sink_places.device
    own = start + torch.arange(n_blocks * rows, device=device).view(n_blocks, rows, 1)
    places = own[:, :1] - (window - 1) + torch.arange(rows + window - 1, device=device)  # (blocks, 1, keys)
    near = (places <= own) & (places > own - window) & (places >= 0)
    if seen is None:
        return (near & (places >= n_sinks))[None], sink_places[:, None, None] <= own
    visible = seen.visible[:, places.clamp(0, n_keys - 1)]
    near = near & visible & (places >= seen.first[:, None, None, None] + n_sinks)
    real = seen.visible.gather(1, sink_places.clamp(max=n_keys - 1)) & (sink_places < n_keys)
    return near, (sink_places[:, None, None] <= own) & real[:, None, None]


def far_read(
    query: Tensor, key: Tensor, value: Tensor, reads: Tensor, *, scoring: Scoring, seen: Visibility
) -> tuple[Tensor, int]:
    """Full causal attention for the tokens that read.

    Args:
        query: (B, H, T, D).
        key: (B, H / G, S, D).
        value: (B, H / G, S, Dv).
        reads: whether a token reads, bool (B, T).
        scoring: maps products to scores.
        seen: which keys are visible.

    Returns:
        Outputs of the readers' heads in the order of `reads.nonzero()`, (N, H, Dv), and the number of pairs scored, for
        one head. Readers are taken in blocks, and a block is scored against the keys up to its last reader.
    """
    start = key.shape[2] - query.shape[2]
    answers, n_scored = [], 0
    for b, row in enumerate(reads):
        for tokens in row.nonzero().squeeze(1).split(READERS_AT_ONCE):
            if not len(tokens):
                continue
            n_seen = start + int(tokens[-1]) + 1
            allowed, bias = _seen_by(tokens, start, n_seen, b, seen)
            n_scored += len(tokens) * n_seen
            heads = _attend(
                query[b].index_select(1, tokens), key[b, :, :n_seen], value[b, :, :n_seen], allowed, bias, scoring
            )
            answers.append(heads.transpose(0, 1))
    if not answers:
        return query.new_zeros(0, query.shape[1], value.shape[3]), 0
    return torch.cat(answers), n_scored


def read_by_heads(
    near: Tensor, query: Tensor, key: Tensor, value: Tensor, reads: Tensor, *, scoring: Scoring, seen: Visibility
) -> tuple[Tensor, float]:
    """Full causal attention for the heads that read; keys of a group without a reader are not touched.

    Args:
        near: outputs of the heads over the window, (B, T, H, Dv).
        query: (B, H, T, D).
        key: (B, H / G, S, D).
        value: (B, H / G, S, Dv).
        reads: whether a head of a token reads, bool (B, T, H).
        scoring: maps products to scores.
        seen: which keys are visible.

    Returns:
        Outputs of the heads, (B, T, H, Dv), of the full attention where they read and of the window elsewhere; and the
        number of pairs scored, for one head. A head that reads for some token is computed for every token.
    """
    n_batch, n_heads, n_tokens, _ = query.shape
    n_keys, shared = key.shape[2], n_heads // key.shape[1]
    heads, n_scored = near.clone(), 0.0
    tokens = torch.arange(n_tokens, device=query.device)
    for group in range(key.shape[1]):
        which = group * shared + reads[..., group * shared : (group + 1) * shared].any(0).any(0).nonzero().squeeze(1)
        if not len(which):
            continue
        n_scored += n_batch * n_tokens * n_keys * len(which) / n_heads
        keys, values = key[:, group : group + 1], value[:, group : group + 1]
        if seen is None and scoring.plain and n_tokens in (1, n_keys):
            full = F.scaled_dot_product_attention(
                query[:, which], keys.expand(-1, len(which), -1, -1), values.expand(-1, len(which), -1, -1),
                is_causal=n_tokens > 1, scale=scoring.scale,
            )  # fmt: skip
        else:
            rows = []
            for b in range(n_batch):
                parts = _seen_by(tokens, n_keys - n_tokens, n_keys, b, seen)
                allowed, bias = (p if p is None or len(p) == 1 else p[which] for p in parts)
                own = scoring if scoring.sinks is None else scoring._replace(sinks=scoring.sinks[which])
                rows.append(_attend(query[b, which], keys[b], values[b], allowed, bias, own))
            full = torch.stack(rows)
        chosen = reads[..., which][..., None]
        heads[:, :, which] = torch.where(chosen, full.transpose(1, 2), near[:, :, which])
    return heads, n_scored


def _seen_by(tokens: Tensor, start: int, n_seen: int, b: int, seen: Visibility) -> tuple[Tensor | None, Tensor | None]:
    """Which of the first `n_seen` keys some tokens of sequence b see, and what is added to their scores.

    The last of these keys is the last token's own.

    Returns:
        Bool and floating, (H or 1, N, S) each. None in the first place: all keys; in the second: nothing.
    """
    if isinstance(seen, Mask):
        bias = None if seen.bias is None else seen.bias[b, :, tokens, :n_seen]
        return seen.allowed[b, :, tokens, :n_seen], bias
    if seen is None and len(tokens) == 1:
        return None, None
    allowed = torch.arange(n_seen, device=tokens.device) <= start + tokens[:, None]
    if seen is not None:
        allowed = allowed & seen.visible[b, :n_seen]
    return (None if bool(allowed.all()) else allowed[None]), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, bias: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention of queries (H, N, D) to keys (H / G, S, D) under a mask and a bias, (H or 1, N, S) each; (H, N, D)."""
    n_heads, n_queries, _ = query.shape
    n_groups = len(key)

    def by_group(part: Tensor) -> Tensor:
        """(H or 1, N, S) as (H / G or 1, G N, S)."""
        if len(part) == n_heads and n_heads > 1:
            return part.unflatten(0, (n_groups, -1)).flatten(1, 2)
        return part.repeat(1, n_heads // n_groups, 1)

    packed = query.unflatten(0, (n_groups, -1)).flatten(1, 2)  # (H / G, G N, D)
    if scoring.plain and bias is None:
        mask = None if allowed is None else by_group(allowed)[None]
        heads = F.scaled_dot_product_attention(
            packed[None], key[None], value[None], attn_mask=mask, scale=scoring.scale
        )[0]
    else:
        scores = scoring(packed @ key.transpose(-1, -2))
        if bias is not None:
            scores = scores + by_group(bias)
        if allowed is not None:
            scores = scores.masked_fill(~by_group(allowed), _NEVER)
        by_head = scores.unflatten(1, (-1, n_queries))
        heads = scoring.weights(by_head, n_groups, n_heads // n_groups, 1, 1).flatten(1, 2).to(value.dtype) @ value
    return heads.unflatten(1, (-1, n_queries)).flatten(0, 1)
