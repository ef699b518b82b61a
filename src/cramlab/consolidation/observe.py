"""Full read and window side by side: what adapters and gates learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cramlab.consolidation.patch import Decision, FarReads, Seen
from cramlab.hf.attention_sites import AttentionSite

Look = Callable[[int, Seen], Decision | None]


class Observer(FarReads):
    """Shows every layer's calls to a function, which may also decide; where it returns None, the original answers.

    Args:
        index: of the site, the function's first argument.
        look: the function.
        window: as for `FarReads`.
        n_sinks: likewise.
    """

    def __init__(self, index: int, look: Look, *, window: int, n_sinks: int) -> None:
        super().__init__(window=window, n_sinks=n_sinks)
        self.index, self.look = index, look

    def decide(self, seen: Seen) -> Decision | None:
        """What the function says."""
        return self.look(self.index, seen)


def observed(sites: Sequence[AttentionSite], window: int, n_sinks: int, look: Look) -> dict[int, FarReads]:
    """One observer a site, to be installed; `look(i, seen)` is called for site i."""
    return {site.layer: Observer(i, look, window=window, n_sinks=n_sinks) for i, site in enumerate(sites)}


def added_by_far(site: AttentionSite, full: Tensor, near: Tensor) -> Tensor:
    """What the full read adds to the layer's answer, (..., d_model), from heads (..., H, D)."""
    answers = site.out_proj.forward(torch.stack([full.flatten(-2), near.flatten(-2)]))  # without its hooks
    return answers[0] - answers[1]
