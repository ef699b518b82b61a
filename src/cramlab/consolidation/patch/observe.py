"""Observing a model: each layer's window and full attention side by side, for learning, measuring and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.consolidation.patch.install import patched
from cramlab.hf.attention_sites import AttentionSite, base_model

Look = Callable[[int, Seen], Decision | None]


class Observer(FarReads):
    """Passes what one layer sees to a function, which may decide; where it returns None, the original answers.

    Args:
        index: index of the site, the function's first argument.
        look: the function.
        window: as for `FarReads`.
        n_sinks: as for `FarReads`.
    """

    def __init__(self, index: int, look: Look, *, window: int, n_sinks: int) -> None:
        super().__init__(window=window, n_sinks=n_sinks)
        self.index, self.look = index, look

    def decide(self, seen: Seen) -> Decision | None:
        """What the function returns."""
        return self.look(self.index, seen)


def observe(
    model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor, look: Look, *, window: int, n_sinks: int
) -> Tensor:
    """Runs a model without its head and calls `look(i, seen)` for each site i.

    Args:
        model: a causal language model without a patch.
        sites: attention sub-layers to be observed.
        tokens: (B, T).
        look: may decide, as `FarReads.decide` does; None: the original answers.
        window: as for `FarReads`.
        n_sinks: as for `FarReads`.

    Returns:
        The last hidden states, (B, T, D).
    """
    layers = {site.layer: Observer(i, look, window=window, n_sinks=n_sinks) for i, site in enumerate(sites)}
    with patched(model, layers):
        return base_model(model)(input_ids=tokens, use_cache=False).last_hidden_state


def added_by_far(site: AttentionSite, full: Tensor, near: Tensor) -> Tensor:
    """What the far read adds to the layer's output, (..., d_model), from heads of full and near, (..., H, Dh) each."""
    outputs = site.out_proj.forward(torch.stack([full.flatten(-2), near.flatten(-2)]))  # without hooks
    return outputs[0] - outputs[1]
