"""What consolidation is compared with: other ways to leave out the same share of far reads.

Each function returns layers to install. Those built on `ObservedAttention` compute everything and choose afterwards, so
they show a loss, never a saving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cramlab.audit.capture import Seen, watching
from cramlab.audit.regression import LinearProbe, Moments, RidgePath
from cramlab.hf.attention_sites import AttentionSite, affine_map, base_model
from cramlab.hf.consolidated import ConsolidatedAttention, patched
from cramlab.retrofit.fit import scaled, unit_scale
from cramlab.retrofit.learn import no_token
from cramlab.retrofit.observe import Answer, Sight, added_by_far, observed

Layers = dict[int, ConsolidatedAttention]


def static_window(sites: Sequence[AttentionSite], window: int, n_sinks: int) -> Layers:
    """Every token of every layer sees the window and the first tokens only."""
    layers = {s.layer: ConsolidatedAttention.beside(s, rank=0, window=window, n_sinks=n_sinks) for s in sites}
    for layer in layers.values():
        layer.rule = no_token
    return layers


def by_chance(layers: Layers, skipped_frac: float, seed: int) -> Layers:
    """The learned layers, but who reads is drawn by lot."""
    for i, layer in layers.items():
        generator = torch.Generator().manual_seed(seed * 1000 + i)
        layer.rule = lambda scores, generator=generator: (
            torch.rand(scores.shape, generator=generator).to(scores.device) >= skipped_frac
        )
    return layers


def some_layers(layers: Layers, without: Sequence[int]) -> Layers:
    """The learned layers, but whole layers read for every token and others for none."""
    for i, layer in layers.items():
        layer.rule = no_token if i in without else every_token
    return layers


def every_token(scores: Tensor) -> Tensor:
    """A rule by which everybody reads."""
    return torch.ones_like(scores, dtype=torch.bool)


def oracle(
    sites: Sequence[AttentionSite], layers: Layers, sensitivity: Sequence[float], window: int, n_sinks: int,
    threshold: float, seen: list[Tensor] | None = None,
) -> Layers:  # fmt: skip
    """Reads where skipping would cost more than a threshold by its true error: what no gate can know.

    Args:
        sites: of the model.
        layers: learned adapters.
        sensitivity: nats per squared error, by site.
        window: of all layers.
        n_sinks: of all layers.
        threshold: of log nats.
        seen: takes the log nats of every far token, to choose thresholds from.
    """

    def choose(i: int) -> Callable[[Sight], Answer]:
        def chosen(sight: Sight) -> Answer:
            adapted = layers[sites[i].layer].adapt(sight.features)
            error = (added_by_far(sites[i], sight.full, sight.near) - adapted).square().sum(-1)
            nats = (error * sensitivity[i]).clamp(min=1e-30).log()
            if seen is not None:
                seen.append(nats[sight.far])
            skips = sight.far & (nats <= threshold)
            heads = torch.where(skips[..., None, None], sight.near, sight.full)
            return Answer(heads, torch.where(skips[..., None], adapted, 0.0), int((sight.far & ~skips).sum()))

        return chosen

    return observed(sites, window, n_sinks, choose)


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
    windowed[importance.flatten().argsort()[:n_windowed]] = True
    windowed = windowed.view_as(importance)

    def choose(i: int) -> Callable[[Sight], Answer]:
        def chosen(sight: Sight) -> Answer:
            mask = (sight.far[..., None] & windowed[i].to(sight.far.device))[..., None]
            reads = float(sight.far.sum()) * float((~windowed[i]).double().mean())
            return Answer(torch.where(mask, sight.near, sight.full), None, reads)

        return chosen

    return observed(sites, window, n_sinks, choose)


def dropped(
    sites: Sequence[AttentionSite], which: Sequence[int], window: int, n_sinks: int,
    instead: Sequence[LinearProbe] | None = None,
) -> Layers:  # fmt: skip
    """Whole attention sub-layers say nothing, or what a linear map of their input says.

    Args:
        sites: of the model.
        which: indices of the sites without attention.
        window: only to count what is far.
        n_sinks: likewise.
        instead: by site, from what attention sees to its answer; None: nothing.

    Source: dropping, LLM-Drop (He et al. 2024); linear maps, after ReplaceMe (Shopkhoev et al. 2025).
    """

    def choose(i: int) -> Callable[[Sight], Answer]:
        def chosen(sight: Sight) -> Answer:
            if i not in which:
                return Answer(sight.full, None, int(sight.far.sum()))
            hidden = sight.features[..., : sites[i].d_model]
            bias = affine_map(sites[i])[1].to(hidden)
            return Answer(torch.zeros_like(sight.full), (0.0 if instead is None else instead[i](hidden)) - bias, 0)

        return chosen

    return observed(sites, window, n_sinks, choose)


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

    def look(i: int, seen: Seen) -> None:
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

    def choose(i: int) -> Callable[[Sight], Answer | None]:
        def chosen(sight: Sight) -> None:
            difference = (sight.full - sight.near)[sight.far].float()  # (N, H, Dh)
            squares = torch.einsum("nhd,hdm->nhm", difference, weights[i]).square().sum((0, 2))
            sums[i] += sensitivity[i] * squares.double().cpu()

        return chosen

    for tokens in documents:
        with patched(model, observed(sites, window, n_sinks, choose)):
            base_model(model)(input_ids=tokens[None], use_cache=False)
    return sums
