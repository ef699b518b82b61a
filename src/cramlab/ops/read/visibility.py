"""Which entries of a buffer a reader may see."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_places(last: Tensor, n_places: int, filled: Tensor | None, capacity: int | None) -> Tensor:
    """Attention mask of readers over the slots of a buffer.

    Args:
        last: newest slot that each reader may see, (B, R), >= 0.
        n_places: number of slots in the buffer, S.
        filled: false on empty slots, bool (B, S); None: all slots up to `last` are filled.
        capacity: a reader sees the newest `capacity` filled slots up to its `last`; None: all of them.

    Returns:
        bool (B, R, S). A reader always sees its `last` slot, so no row of the mask is empty.
    """
    places = torch.arange(n_places, device=last.device)
    visible = places <= last[..., None]
    if filled is not None:
        visible = filled[:, None] & visible
    if capacity is not None and capacity < n_places:
        n_written = (places + 1).expand(len(last), -1) if filled is None else filled.cumsum(dim=1)
        newer = n_written.gather(1, last)[..., None] - n_written[:, None]
        visible = visible & (newer < capacity)
    return visible if filled is None else visible | (places == last[..., None])
