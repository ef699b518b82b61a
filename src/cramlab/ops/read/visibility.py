"""Which entries of a buffer a reader may see."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_places(last: Tensor, n_places: int, filled: Tensor | None, capacity: int | None) -> Tensor:
    """Attention mask of readers over the places of a buffer.

    Args:
        last: newest place that each reader may see, (B, R), >= 0.
        n_places: number of places in the buffer, S.
        filled: false on empty places, bool (B, S); None: all places up to `last` are filled.
        capacity: a reader sees the newest `capacity` filled places up to its `last`; None: all of them.

    Returns:
        bool (B, R, S). A reader always sees its `last` place, so no row of the mask is empty.
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
