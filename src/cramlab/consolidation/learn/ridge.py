"""Ridge regressions for adapters and gates, from streamed sums.

Source: ours; the regressions are those of the audit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cramlab.auditing.regression import LinearProbe, Moments, ReducedRank, RidgePath


def scaled(moments: Moments, scale: Tensor) -> Moments:
    """The moments with x * scale in place of x, so that one ridge strength suits features of any size; scale (D,)."""
    out = Moments(len(moments.x), len(moments.y))
    out.n, out.y = moments.n, moments.y
    out.x, out.xx, out.xy = moments.x * scale, moments.xx * torch.outer(scale, scale), moments.xy * scale[:, None]
    return out


def unit_scale(moments: Moments) -> Tensor:
    """Factors that give every feature unit variance, (D,); 0 for a constant feature."""
    variance = moments.xx.diagonal() / moments.n - (moments.x / moments.n).square()
    return torch.where(variance > 1e-12, variance.clamp(min=1e-12).rsqrt(), 0.0)


@dataclass(frozen=True)
class Adapter:
    """Reduced-rank adapters for every rank up to the largest, R.

    Attributes:
        down: map to the strongest directions, weight (F, R), bias (R,).
        up: map from these directions to the output, (R, M).
        mean: output of the adapter of rank 0, (M,).
        gains: decrease of the mean squared error on held-out tokens by each further rank, (R,).
        strength: the chosen ridge strength.
    """

    down: LinearProbe
    up: Tensor
    mean: Tensor
    gains: Tensor
    strength: float


def fit_adapter(fit: Moments, held_out: Moments, strengths: Sequence[float], max_rank: int) -> Adapter:
    """Reduced-rank ridge regression with the strength that gains most on held-out tokens at its best rank."""
    scale = unit_scale(fit)
    path, other = RidgePath(scaled(fit, scale)), scaled(held_out, scale)
    xx, xy = other.about(path.x_mean, path.y_mean)
    best: Adapter | None = None
    for strength in strengths:
        down, up = ReducedRank(path, strength).factors(max_rank)
        gains = (2 * down.weight * (xy @ up.T) - down.weight * (xx @ down.weight)).sum(dim=0) / other.n
        gains = gains.cpu()
        if best is None or _most(gains) > _most(best.gains):
            best = Adapter(LinearProbe(scale[:, None] * down.weight, down.bias), up, path.y_mean, gains, strength)
    assert best is not None
    return best


def _most(gains: Tensor) -> float:
    """The gain at the best rank, from the gains of each further rank, (R,); 0 where R = 0."""
    return float(gains.cumsum(0).max()) if len(gains) else 0.0


def choose_ranks(gains: Sequence[Tensor], weights: Sequence[float], bytes_per_rank: int, n_bytes: int) -> list[int]:
    """Ranks that gain most nats within a budget of bytes: a rank has the same price in every layer.

    Args:
        gains: held-out gain of each further rank, (R,) a layer.
        weights: loss per squared error of each layer, nats.
        bytes_per_rank: size of one rank of one layer, bytes.
        n_bytes: size of all ranks together, at most, bytes.

    Returns:
        The rank of each layer.
    """
    totals = [torch.cat([g.new_zeros(1), weight * g.cumsum(0)]) for g, weight in zip(gains, weights, strict=True)]

    def at(price: float) -> list[int]:
        return [int((total - price * torch.arange(len(total))).argmax()) for total in totals]

    low, high = 0.0, max(float(total.max()) for total in totals) + 1e-30
    if sum(at(low)) * bytes_per_rank <= n_bytes:
        return at(low)
    for _ in range(60):
        price = (low + high) / 2
        low, high = (price, high) if sum(at(price)) * bytes_per_rank > n_bytes else (low, price)
    return at(high)


def fit_gate(fit: Moments, held_out: Moments, strengths: Sequence[float]) -> tuple[LinearProbe, float]:
    """Ridge regression with the strength that has the least error on held-out tokens, and that strength."""
    scale = unit_scale(fit)
    path, other = RidgePath(scaled(fit, scale)), scaled(held_out, scale)
    chosen, _ = path.choose(other, strengths)
    probe = path.probe(chosen)
    return LinearProbe(scale[:, None] * probe.weight, probe.bias), chosen[0]


def sensitivities(increase: Tensor, error: Tensor, n_documents: Tensor, prior_documents: float = 2.0) -> Tensor:
    """Loss per unit of squared error in each layer, nats, (L,).

    A layer's increase is shrunk towards the mean of all layers, with a weight of `prior_documents`, and kept above a
    tenth of that mean, as a few documents say little about one layer.

    Args:
        increase: mean increase of a document's loss when this layer alone goes without far reads, nats per token, (L,).
        error: mean squared error of the layer's output in that case, (L,).
        n_documents: number of documents on which these were measured, (L,).
        prior_documents: weight of the mean of all layers, in documents.
    """
    seen = n_documents > 0
    mean = increase[seen].mean().clamp(min=1e-6)
    pulled = (torch.where(seen, increase, 0.0) * n_documents + prior_documents * mean) / (n_documents + prior_documents)
    return pulled.clamp(min=0.1 * mean) / error.clamp(min=1e-12)
