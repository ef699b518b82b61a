"""The reference implementation of the recurrence: its definition, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def decay_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """Solves `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]`; arguments and result as in `chunked.decay_scan`."""
    states = []
    for t in range(u.shape[1]):
        state = torch.exp(-rates * gaps[:, t, None])[..., None] * state + u[:, t]
        states.append(state)
    return torch.stack(states, dim=1)
