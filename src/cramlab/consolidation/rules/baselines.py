"""Skipping rules that consolidation is compared with, for a layer and for a whole model.

Source: ours, except static heads: after DuoAttention (Xiao et al. 2024), which learns the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.consolidation.patch.observe import added_by_far, observe
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.hf.attention_sites import AttentionSite, affine_map

_LEAST_NATS = 1e-30

Layers = Mapping[int, FarReads]
Learned = Mapping[int, ConsolidatedAttention]


class WindowOnly(FarReads):
    """No token reads: every token attends to window and first keys, and nothing is added."""

    never_reads = True

    def decide(self, seen: Seen) -> Decision:
        """No token reads."""
        return torch.zeros_like(seen.far), None


class ByChance(FarReads):
    """Readers are drawn at random; for the others, a learned adapter predicts the far read.

    The draw depends on the position alone, so it is the same however many tokens come in one call.

    Args: learned: layer whose adapter is used. skipped_frac: probability that a token does not read.
        seed: seed of the draws.
    """

    def __init__(self, learned: ConsolidatedAttention, *, skipped_frac: float, seed: int) -> None:
        super().__init__(window=learned.window, n_sinks=learned.n_sinks)
        self.learned, self.skipped_frac, self.seed = learned, skipped_frac, seed

    def decide(self, seen: Seen) -> Decision:
        """Draws for all positions up to the last, and keeps those of this call."""
        n_batch, n_tokens = seen.far.shape
        generator = torch.Generator().manual_seed(self.seed)
        chance = torch.rand(seen.start + n_tokens, n_batch, generator=generator)[seen.start :].T
        return chance.to(seen.far.device) >= self.skipped_frac, self.learned.adapt(seen.features)


class StaticHeads(FarReads):
    """Some heads attend to window and first keys for every token, the others to everything.

    Args:
        windowed: whether a head is one of the former, bool (H,).
        window: as for `FarReads`.
        n_sinks: as for `FarReads`.
    """

    def __init__(self, windowed: Tensor, *, window: int, n_sinks: int) -> None:
        super().__init__(window=window, n_sinks=n_sinks)
        self.windowed = windowed
        self.reads_all = not bool(windowed.any())
        self.never_reads = bool(windowed.all())

    def decide(self, seen: Seen) -> Decision:
        """The same heads read for every token."""
        return seen.far[..., None] & ~self.windowed.to(seen.far.device), None


class Oracle(FarReads):
    """Reads where skipping costs more than a threshold by its true error, which a gate cannot know.

    It computes every read to decide, so it shows an attainable loss, not a saving.

    Args:
        site: attention sub-layer that it is installed at.
        learned: layer whose adapter is used. sensitivity: loss per squared error, nats.
        threshold: log nats.
    """

    def __init__(
        self, site: AttentionSite, learned: ConsolidatedAttention, *, sensitivity: float, threshold: float
    ) -> None:
        super().__init__(window=learned.window, n_sinks=learned.n_sinks)
        self.site, self.learned, self.sensitivity, self.threshold = site, learned, sensitivity, threshold

    def log_nats(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Log of the nats that a skip costs, (B, T), and the adapter's output, (B, T, D)."""
        adapted = self.learned.adapt(seen.features)
        error = (added_by_far(self.site, seen) - adapted).square().sum(-1)
        return (error * self.sensitivity).clamp(min=_LEAST_NATS).log(), adapted

    def decide(self, seen: Seen) -> Decision:
        """Reads where the cost is above the threshold; a mixture of 0 and 1, as the full read is computed already."""
        nats, adapted = self.log_nats(seen)
        return (nats > self.threshold).to(adapted.dtype), adapted


def static_window(sites: Sequence[AttentionSite], window: int, n_sinks: int) -> Layers:
    """`WindowOnly` in every layer."""
    return {site.layer: WindowOnly(window=window, n_sinks=n_sinks) for site in sites}


def by_chance(layers: Learned, skipped_frac: float, seed: int) -> Layers:
    """`ByChance` in every layer, with the learned adapters."""
    return {i: ByChance(layer, skipped_frac=skipped_frac, seed=seed * 1000 + i) for i, layer in layers.items()}


def some_layers(layers: Learned, without: Sequence[int]) -> Layers:
    """The learned layers, of which those with an index in `without` never read and the others always."""
    return {i: layer.at(float("inf") if i in without else -float("inf")) for i, layer in layers.items()}


def static_heads(
    sites: Sequence[AttentionSite], importance: Tensor, skipped_frac: float, window: int, n_sinks: int
) -> Layers:
    """`StaticHeads` in every layer: the least important heads of the whole model attend to the window.

    Args:
        sites: attention sub-layers of the model.
        importance: importance of each head, (L, H); see `head_importance`.
        skipped_frac: share of the heads that attend to the window.
        window: as for `FarReads`.
        n_sinks: as for `FarReads`.
    """
    n_windowed = round(skipped_frac * importance.numel())
    windowed = torch.zeros(importance.numel(), dtype=torch.bool)
    windowed[importance.flatten().argsort()[:n_windowed].cpu()] = True
    return {
        site.layer: StaticHeads(of_layer, window=window, n_sinks=n_sinks)
        for site, of_layer in zip(sites, windowed.view_as(importance), strict=True)
    }


def head_importance(
    model: nn.Module, sites: Sequence[AttentionSite], sensitivity: Sequence[float], documents: Sequence[Tensor],
    window: int, n_sinks: int,
) -> Tensor:  # fmt: skip
    """Nats that each head's far reads are worth on documents (T,) by its own squared error, (L, H)."""
    n_heads = sites[0].n_heads
    sums = torch.zeros(len(sites), n_heads, dtype=torch.float64)
    weights = [affine_map(site)[0].float().unflatten(0, (n_heads, -1)) for site in sites]  # (H, Dh, D)

    def look(i: int, seen: Seen) -> None:
        difference = (seen.full - seen.near)[seen.far].float()  # (N, H, Dh)
        squares = torch.einsum("nhd,hdm->nhm", difference, weights[i]).square().sum((0, 2))
        sums[i] += sensitivity[i] * squares.double().cpu()

    for tokens in documents:
        observe(model, sites, tokens[None], look, window=window, n_sinks=n_sinks)
    return sums


def oracle(
    sites: Sequence[AttentionSite], layers: Learned, sensitivity: Sequence[float], threshold: float
) -> dict[int, Oracle]:
    """`Oracle` in every layer.

    Args:
        sites: attention sub-layers of the model.
        layers: learned layers, whose adapters are used.
        sensitivity: loss per squared error of each site, nats.
        threshold: log nats.
    """
    return {
        site.layer: Oracle(site, layers[site.layer], sensitivity=nats, threshold=threshold)
        for site, nats in zip(sites, sensitivity, strict=True)
    }


def oracle_threshold(
    model: nn.Module, sites: Sequence[AttentionSite], layers: Learned, sensitivity: Sequence[float],
    documents: Sequence[Tensor], skipped_frac: float,
) -> float:  # fmt: skip
    """The threshold, log nats, at which an oracle skips this share of the far reads of documents (T,)."""
    rules = oracle(sites, layers, sensitivity, -torch.inf)
    costs: list[Tensor] = []

    def look(i: int, seen: Seen) -> None:
        costs.append(rules[sites[i].layer].log_nats(seen)[0][seen.far])

    one = next(iter(layers.values()))
    for tokens in documents:
        observe(model, sites, tokens[None], look, window=one.window, n_sinks=one.n_sinks)
    ordered = torch.cat(costs).sort().values
    return float(ordered[int(skipped_frac * len(ordered))])
