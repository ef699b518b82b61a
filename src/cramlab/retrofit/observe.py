"""Full read and window side by side: what adapters and gates learn from, and what baselines and the oracle mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.consolidated import ConsolidatedAttention
from cramlab.hf.far_reads import Padding, has_far, window_read


class Sight(NamedTuple):
    """One layer on one batch.

    Attributes:
        features: see `ConsolidatedAttention`, (B, T, F).
        far: tokens that have something far to read, bool (B, T).
        full: heads of the full read, (B, T, H, D).
        near: heads of the window, (B, T, H, D).
    """

    features: Tensor
    far: Tensor
    full: Tensor
    near: Tensor


class Answer(NamedTuple):
    """What a layer is made to say.

    Attributes:
        heads: (B, T, H, D).
        added: after the output projection, (B, T, D).
        n_reads: far reads that this stands for; a read by half of the heads is half a read.
    """

    heads: Tensor
    added: Tensor | None
    n_reads: float


Choose = Callable[[Sight], Answer | None]


class ObservedAttention(ConsolidatedAttention):
    """Computes both reads for every token and lets a function choose. For analysis: it saves nothing."""

    choose: Choose

    def attend(
        self,
        original: Callable[[], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """The original's heads unless `choose` returns others."""
        padding = Padding.of(mask)
        self._correction = None
        full = original()
        far = has_far(query.shape[2], key.shape[2], self.window, self.n_sinks, padding, query).expand(len(query), -1)
        near = window_read(query, key, value, window=self.window, n_sinks=self.n_sinks, scale=scale, padding=padding)
        assert self.seen is not None
        features = torch.cat([self.seen, near.heads.flatten(2), near.masses], dim=-1)
        self.seen = None
        answer = self.choose(Sight(features, far, full, near.heads))
        if answer is None:
            return full
        self._correction = answer.added
        self.counts.far_tokens += int(far.sum())
        self.counts.far_reads += answer.n_reads
        return answer.heads


def observed(
    sites: Sequence[AttentionSite], window: int, n_sinks: int, choose: Callable[[int], Choose]
) -> dict[int, ConsolidatedAttention]:
    """One observer a site, to be installed; `choose(i)` chooses for site i."""
    layers: dict[int, ConsolidatedAttention] = {}
    for i, site in enumerate(sites):
        layer = ObservedAttention.beside(site, rank=0, window=window, n_sinks=n_sinks)
        assert isinstance(layer, ObservedAttention)
        layer.choose = choose(i)
        layers[site.layer] = layer
    return layers


def added_by_far(site: AttentionSite, full: Tensor, near: Tensor) -> Tensor:
    """What the full read adds to the layer's answer, (..., d_model), from heads (..., H, D)."""
    answers = _out_proj(site)(torch.stack([full.flatten(-2), near.flatten(-2)]))
    return answers[0] - answers[1]


def _out_proj(site: AttentionSite) -> Callable[[Tensor], Tensor]:
    """The output projection without its hooks."""
    module: nn.Module = site.out_proj
    return module.forward
