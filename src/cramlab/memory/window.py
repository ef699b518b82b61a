"""The window: every token attends to the newest few entries that it sees, whether or not it reads the whole buffer.

It uses the queries, keys, values and output map of the episodic memory, so a layer that never reads is one of
sliding-window attention, and a read replaces the window's answer by that of all entries. Source: ours; a window beside
gated reads as in LoGo (arXiv 2608.29539).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.memory.buffer import Written
from cramlab.memory.episodic import EpisodicMemory
from cramlab.memory.readers import select_everyone
from cramlab.ops.read import attention


def window_answers(
    memory: EpisodicMemory, h: Tensor, written: Written, can_read: Tensor, window: int, *, fixed: bool
) -> Tensor:
    """Attention of every token to the newest `window` entries that it sees, (B, T, D).

    Args:
        memory: the episodic memory of the layer.
        h: tokens of the call that made `written`, (B, T, D).
        written: from `EpisodicMemory.write`.
        can_read: the tokens that see an entry, bool (B, T); the answers of the others are zero.
        window: number of entries.
        fixed: no size may depend on which tokens these are.
    """
    tokens = select_everyone(can_read, fixed=fixed)
    return tokens.put_onto(memory.read(h, tokens, written, window), torch.zeros_like(h))


def window_step(
    memory: EpisodicMemory,
    h: Tensor,
    position: Tensor | None,
    keys: Tensor,
    values: Tensor,
    n_written: Tensor,
    window: int,
) -> Tensor:
    """`window_answers` for the newest token of each sequence, (B, D), with the entries in rings.

    Args:
        memory: the episodic memory of the layer.
        h: (B, D).
        position: position of each token, (B,); None: none is needed.
        keys: places of the rings, (B, S, D): entry n of a sequence is at place n % S.
        values: (B, S, D).
        n_written: number of entries that each sequence has written, int64 (B,).
        window: number of entries.
    """
    n_places = keys.shape[1]
    if not n_places:
        return torch.zeros_like(h)
    back = torch.arange(min(window, n_places), device=h.device)
    place = (n_written[:, None] - 1 - back) % n_places
    seen = (back < n_written[:, None]) | (back == 0)  # a softmax needs some entry
    wide = place[..., None].expand(-1, -1, keys.shape[-1])
    query = memory.queries(h, position)[:, None]
    found = attention.dense(query, keys.gather(1, wide), values.gather(1, wide), memory.config.n_heads, seen[:, None])
    return torch.where(n_written[:, None] > 0, memory.w_out(found[:, 0]), 0.0)
