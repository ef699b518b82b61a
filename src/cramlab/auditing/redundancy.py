"""Measures how well probes predict: per token, summed by document, position, class of token and rank."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cramlab.auditing.capture import Seen
from cramlab.auditing.probes import MAIN, Inputs, SiteFit
from cramlab.auditing.regression import squared_errors_by_rank
from cramlab.hf.attention_sites import AttentionSite

CLASSES = ("first", "repeated", "novel")
N_BINS = 60
N_EXAMPLES = 12
SHOWN_TOKENS = 12


class Measures(NamedTuple):
    """Measures of each token and unit (the heads, then the layer's output), (N, U) each.

    Attributes:
        r: the paper's R, `1 - |a - a_hat| / |a|`; 0 where a is zero.
        cosine: cosine of a and a_hat; 0 where either is zero.
        error: squared error `|a - a_hat|^2`.
        energy: squared norm `|a|^2`.
    """

    r: Tensor
    cosine: Tensor
    error: Tensor
    energy: Tensor


def measure(truth: Tensor, predicted: Tensor) -> Measures:
    """Returns the measures of vectors along the last dimension."""
    energy = truth.square().sum(dim=-1)
    error = (truth - predicted).square().sum(dim=-1)
    lengths = (energy * predicted.square().sum(dim=-1)).sqrt()
    one = torch.ones_like(energy)
    r = 1 - (error / torch.where(energy > 0, energy, one)).sqrt()
    cosine = (truth * predicted).sum(dim=-1) / torch.where(lengths > 0, lengths, one)
    return Measures(torch.where(energy > 0, r, 0.0), torch.where(lengths > 0, cosine, 0.0), error, energy)


def _units(site: AttentionSite, heads: Tensor, answer: Tensor, truth: tuple[Tensor, Tensor]) -> Measures:
    """Returns the measures of all heads and, last, of the layer's output; (N, H + 1)."""
    by_head = (-1, site.n_heads, site.d_head)
    each = measure(truth[0].view(by_head), heads.view(by_head))
    whole = measure(truth[1], answer)
    return Measures(*(torch.cat([a, b[:, None]], dim=1) for a, b in zip(each, whole, strict=True)))


def position_bins(length: int) -> list[tuple[int, int]]:
    """Returns the bins of positions 0, 1, 2-3, 4-7, ... as (first, last)."""
    bins, first = [(0, 0)], 1
    while first < length:
        bins.append((first, min(2 * first, length) - 1))
        first *= 2
    return bins


def token_classes(tokens: Tensor, ngram: int) -> Tensor:
    """Returns the index into `CLASSES` of every token of (B, T): first in context, end of a repeated n-gram, novel."""
    classes = torch.full_like(tokens, CLASSES.index("novel"))
    for row, ids in enumerate(tokens.tolist()):
        before: set[tuple[int, ...]] = set()
        for end in range(ngram, len(ids) + 1):
            gram = tuple(ids[end - ngram : end])
            if gram in before:
                classes[row, end - 1] = CLASSES.index("repeated")
            before.add(gram)
    classes[:, 0] = CLASSES.index("first")
    return classes


@dataclass(frozen=True)
class Example:
    """One token with its R, averaged over layers, and the token ids around it."""

    r: float
    document: int
    position: int
    before: tuple[int, ...]
    token: int
    after: tuple[int, ...]


class Tally:
    """Sums over the test part, one row per document, so that documents can be resampled.

    Attributes:
        sums: r, cosine, error, energy and number of tokens; (documents, probes, layers, units, 5), float64.
        groups: r, error, error of the mean and number of tokens of the main probe of the layer's output; (documents,
            layers, bins of positions then classes, 4).
        ranks: squared error of the layer's output by rank; (documents, layers, ranks).
        histogram: number of tokens by r of the main probe, from -1 to 1; (layers, units, bins).
        best: the best predicted tokens by R averaged over layers.
        worst: the worst predicted tokens.
    """

    TENSORS = ("sums", "groups", "ranks", "histogram")

    def __init__(
        self, sites: Sequence[AttentionSite], probes: Sequence[str], n_documents: int, length: int, ngram: int
    ) -> None:
        self.sites, self.probes, self.ngram = sites, tuple(probes), ngram
        self.bins = position_bins(length)
        self.rank_grid = rank_grid(sites[0].d_model)
        n_layers, n_units = len(sites), sites[0].n_heads + 1
        self.sums = torch.zeros(n_documents, len(self.probes), n_layers, n_units, 5, dtype=torch.float64)
        n_groups = len(self.bins) + len(CLASSES)
        self.groups = torch.zeros(n_documents, n_layers, n_groups, 4, dtype=torch.float64)
        self.ranks = torch.zeros(n_documents, n_layers, len(self.rank_grid), dtype=torch.float64)
        self.histogram = torch.zeros(n_layers, n_units, N_BINS, dtype=torch.float64)
        self.best: list[tuple[float, int, Example]] = []
        self.worst: list[tuple[float, int, Example]] = []
        self._n_examples = 0
        self._mean_r: Tensor | None = None

    def add(self, document: int, layer: int, seen: Seen, inputs: Inputs, fit: SiteFit, tokens: Tensor) -> None:
        """Adds the measures of one layer on a batch of contexts (B, T) of one document."""
        truth = (seen.heads, seen.answer)
        measured = {}
        for i, name in enumerate(self.probes):
            m = measured[name] = _units(self.sites[layer], *fit.probes[name].answers(inputs), truth)
            n_tokens = torch.full_like(m.r, 1.0)
            rows = torch.stack([m.r, m.cosine, m.error, m.energy, n_tokens], dim=-1)
            self.sums[document, i, layer] += rows.double().sum(dim=0).cpu()
        main, mean = (Measures(*(values.cpu() for values in measured[name])) for name in (MAIN, "mean"))
        self._add_histogram(layer, main.r)
        self._add_groups(document, layer, main, mean, inputs.position.cpu(), tokens.cpu())
        residual = (seen.answer - fit.reduced.y_mean.float()) @ fit.reduced.directions.float()
        coordinates = fit.reduced.coordinates.float()(inputs.hidden)
        by_rank = squared_errors_by_rank(coordinates, residual, self.rank_grid)
        self.ranks[document, layer] += by_rank.double().sum(dim=0).cpu()
        whole = main.r[:, -1] / len(self.sites)
        self._mean_r = whole if layer == 0 or self._mean_r is None else self._mean_r + whole

    def _add_histogram(self, layer: int, r: Tensor) -> None:
        places = ((r.clamp(-1, 1) + 1) / 2 * N_BINS).long().clamp(max=N_BINS - 1)
        for unit in range(r.shape[1]):
            self.histogram[layer, unit] += torch.bincount(places[:, unit], minlength=N_BINS)

    def _add_groups(
        self, document: int, layer: int, main: Measures, mean: Measures, position: Tensor, tokens: Tensor
    ) -> None:
        starts = torch.tensor([first for first, _ in self.bins])
        by_position = torch.searchsorted(starts, position, right=True) - 1
        by_class = len(self.bins) + token_classes(tokens, self.ngram).flatten()
        columns = (main.r[:, -1], main.error[:, -1], mean.error[:, -1], torch.ones_like(main.r[:, -1]))
        rows = torch.stack(columns, dim=-1).double()
        for groups in (by_position, by_class):
            self.groups[document, layer].index_add_(0, groups, rows)

    def close_batch(self, document: int, tokens: Tensor) -> None:
        """Ends a batch after its last layer: updates the best and worst predicted tokens."""
        assert self._mean_r is not None
        mean_r = self._mean_r.view(tokens.shape)
        self._mean_r = None
        for kept, sign in ((self.best, 1.0), (self.worst, -1.0)):
            values, places = (sign * mean_r).flatten().topk(min(N_EXAMPLES, mean_r.numel()))
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                row, position = divmod(place, tokens.shape[1])
                ids = tokens[row].tolist()
                before = tuple(ids[max(0, position - SHOWN_TOKENS) : position])
                after = tuple(ids[position + 1 : position + 1 + SHOWN_TOKENS])
                example = Example(sign * value, document, position, before, ids[position], after)
                self._n_examples += 1
                heapq.heappush(kept, (value, -self._n_examples, example))
                if len(kept) > N_EXAMPLES:
                    heapq.heappop(kept)

    def state(self) -> dict[str, Any]:
        """Returns the state that `load` restores."""
        examples = {
            name: [(value, order, *vars(example).values()) for value, order, example in getattr(self, name)]
            for name in ("best", "worst")
        }
        return {name: getattr(self, name) for name in self.TENSORS} | examples | {"n_examples": self._n_examples}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores the sums from a `state`."""
        for name in self.TENSORS:
            getattr(self, name).copy_(state[name])
        for name in ("best", "worst"):
            setattr(self, name, [(value, order, Example(*rest)) for value, order, *rest in state[name]])
        self._n_examples = state["n_examples"]


def rank_grid(d_model: int) -> list[int]:
    """Returns the ranks 0, 1, 2, 4, ... and d_model."""
    ranks = [0]
    while (ranks[-1] or 1) < d_model:
        ranks.append(1 if ranks[-1] == 0 else 2 * ranks[-1])
    return [*(rank for rank in ranks if rank < d_model), d_model]
