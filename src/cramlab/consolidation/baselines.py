"""What consolidation is compared with: other ways to leave out the same share of far reads.

Rules stand in `rules`; here they are put together for a whole model. Whole sub-layers are replaced, not patched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cramlab.auditing.capture import Seen as SeenByAudit
from cramlab.auditing.capture import watching
from cramlab.auditing.regression import LinearProbe, Moments, RidgePath
from cramlab.consolidation.attention import ConsolidatedAttention
from cramlab.consolidation.closed_form import token_losses
from cramlab.consolidation.install import patched
from cramlab.consolidation.measure import DocumentLoss
from cramlab.consolidation.observe import observed
from cramlab.consolidation.patch import FarReads, Seen
from cramlab.consolidation.ridge import scaled, unit_scale
from cramlab.consolidation.rules import ByChance, Oracle, StaticHeads, WindowOnly
from cramlab.hf.attention_sites import AttentionSite, affine_map, base_model

Layers = Mapping[int, FarReads]
Learned = Mapping[int, ConsolidatedAttention]


def static_window(sites: Sequence[AttentionSite], window: int, n_sinks: int) -> Layers:
    """Every token of every layer sees the window and the first tokens only."""
    return {site.layer: WindowOnly(window=window, n_sinks=n_sinks) for site in sites}


def by_chance(layers: Learned, skipped_frac: float, seed: int) -> Layers:
    """The learned adapters, but who reads is drawn by chance."""
    return {i: ByChance(layer, skipped_frac=skipped_frac, seed=seed * 1000 + i) for i, layer in layers.items()}


def some_layers(layers: Learned, without: Sequence[int]) -> Layers:
    """The learned layers, but whole layers read for every token and others for none."""
    return {i: layer.at(float("inf") if i in without else -float("inf")) for i, layer in layers.items()}


def oracle(sites: Sequence[AttentionSite], layers: Learned, sensitivity: Sequence[float], threshold: float) -> Layers:
    """`Oracle` everywhere.

    Args:
        sites: of the model.
        layers: learned adapters.
        sensitivity: nats per squared error, by site.
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
    """The threshold, log nats, at which an oracle would skip this share of the far reads of some documents (T,)."""
    rules = oracle(sites, layers, sensitivity, -torch.inf)
    found: list[Tensor] = []

    def look(i: int, seen: Seen) -> None:
        rule = rules[sites[i].layer]
        assert isinstance(rule, Oracle)
        found.append(rule.log_nats(seen)[0][seen.far])

    one = next(iter(layers.values()))
    for tokens in documents:
        with patched(model, observed(sites, one.window, one.n_sinks, look)):
            base_model(model)(input_ids=tokens[None], use_cache=False)
    ordered = torch.cat(found).sort().values
    return float(ordered[int(skipped_frac * len(ordered))])


def static_heads(
    sites: Sequence[AttentionSite], importance: Tensor, skipped_frac: float, window: int, n_sinks: int
) -> Layers:
    """The least important heads of the whole model see the window for every token, the others everything.

    Args:
        sites: of the model.
        importance: of each head, (L, H).
        skipped_frac: share of the heads.
        window: of the others.
        n_sinks: likewise.

    Source: after DuoAttention (Xiao et al. 2024), which learns the split; here it follows from the error by head.
    """
    n_windowed = round(skipped_frac * importance.numel())
    windowed = torch.zeros(importance.numel(), dtype=torch.bool)
    windowed[importance.flatten().argsort()[:n_windowed].cpu()] = True
    return {
        site.layer: StaticHeads(of_layer, window=window, n_sinks=n_sinks)
        for site, of_layer in zip(sites, windowed.view_as(importance), strict=True)
    }


class Instead(nn.Module):
    """In place of a whole attention sub-layer: silence, or a map of what it sees. No keys or values are written.

    Args:
        instead: the map; None: silence.

    Source: dropping, LLM-Drop (He et al. 2024); linear maps, after ReplaceMe (Shopkhoev et al. 2025).
    """

    def __init__(self, instead: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.instead = instead

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Answer (B, T, D) to what attention sees, and no weights."""
        return torch.zeros_like(hidden_states) if self.instead is None else self.instead(hidden_states), None


@contextlib.contextmanager
def replaced(model: nn.Module, sites: Sequence[AttentionSite], instead: Mapping[int, Instead]) -> Iterator[None]:
    """While open, the sub-layers of some sites, by index in `sites`, are something else."""
    names = {id(module): name.rpartition(".")[::2] for name, module in model.named_modules()}
    try:
        for i, other in instead.items():
            parent, child = names[id(sites[i].attention)]
            setattr(model.get_submodule(parent), child, other)
        yield
    finally:
        for i in instead:
            parent, child = names[id(sites[i].attention)]
            setattr(model.get_submodule(parent), child, sites[i].attention)


def measured_without(
    model: nn.Module, tokens: Tensor, sites: Sequence[AttentionSite], which: Sequence[int],
    instead: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> DocumentLoss:  # fmt: skip
    """One document (T,) by a model without some of its attention sub-layers.

    Args:
        model: the original.
        tokens: (T,).
        sites: of the model.
        which: indices of the sites without attention.
        instead: by site, from what attention sees to its answer; None: silence.
    """
    others = {i: Instead(None if instead is None else instead[i]) for i in which}
    with replaced(model, sites, others):
        loss = float(token_losses(model, tokens).double().mean())
    share = len(which) / len(sites)
    return DocumentLoss(loss, share, 1 - share)


def linear_maps(
    sites: Sequence[AttentionSite], fit: Sequence[Moments], held_out: Sequence[Moments], strengths: Sequence[float]
) -> list[LinearProbe]:
    """From what attention sees to its whole answer, out of the sums that the adapters were fitted on."""
    probes = []
    for site, ours, others in zip(sites, fit, held_out, strict=True):
        whole = [_whole_answer(site, sums) for sums in (ours, others)]
        scale = unit_scale(whole[0])
        path = RidgePath(scaled(whole[0], scale))
        probe = path.probe(path.choose(scaled(whole[1], scale), strengths)[0])
        probes.append(LinearProbe((scale[:, None] * probe.weight).float(), probe.bias.float()))
    return probes


def _whole_answer(site: AttentionSite, sums: Moments) -> Moments:
    """Sums of (hidden state, answer): the answer is the window's, projected, plus what the far read adds."""
    weight, bias = affine_map(site)
    hidden, near = slice(0, site.d_model), slice(site.d_model, site.d_model + site.d_heads)
    out = Moments(site.d_model, site.d_model)
    out.n, out.x, out.xx = sums.n, sums.x[hidden], sums.xx[hidden, hidden]
    out.y = sums.y + sums.x[near] @ weight + sums.n * bias
    out.xy = sums.xy[hidden] + sums.xx[hidden, near] @ weight + torch.outer(out.x, bias)
    return out


def cosine_importance(model: nn.Module, sites: Sequence[AttentionSite], documents: Sequence[Tensor]) -> Tensor:
    """One minus the cosine between the residual stream before and after attention, (L,); LLM-Drop's rule."""
    sums, n = torch.zeros(len(sites), dtype=torch.float64), 0

    def look(i: int, seen: SeenByAudit) -> None:
        after = seen.stream + seen.answer
        sums[i] += float((1 - torch.cosine_similarity(seen.stream, after, dim=-1)).double().sum())

    for tokens in documents:
        with watching(sites, look):
            base_model(model)(input_ids=tokens[None], use_cache=False)
        n += len(tokens)
    return sums / n


def head_importance(
    model: nn.Module, sites: Sequence[AttentionSite], sensitivity: Sequence[float], documents: Sequence[Tensor],
    window: int, n_sinks: int,
) -> Tensor:  # fmt: skip
    """Nats that each head's far read is worth by its squared error alone, (L, H)."""
    n_heads = sites[0].n_heads
    sums = torch.zeros(len(sites), n_heads, dtype=torch.float64)
    weights = [affine_map(site)[0].float().unflatten(0, (n_heads, -1)) for site in sites]  # (H, Dh, D)

    def look(i: int, seen: Seen) -> None:
        difference = (seen.full - seen.near)[seen.far].float()  # (N, H, Dh)
        squares = torch.einsum("nhd,hdm->nhm", difference, weights[i]).square().sum((0, 2))
        sums[i] += sensitivity[i] * squares.double().cpu()

    for tokens in documents:
        with patched(model, observed(sites, window, n_sinks, look)):
            base_model(model)(input_ids=tokens[None], use_cache=False)
    return sums
