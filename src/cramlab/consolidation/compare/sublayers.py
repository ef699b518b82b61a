"""Baselines that replace whole attention sub-layers by nothing or by a linear map; they are not patches.

Source: dropping, LLM-Drop (He et al. 2024); linear maps, after ReplaceMe (Shopkhoev et al. 2025).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cramlab.auditing.capture import Seen, watching
from cramlab.auditing.regression import LinearProbe, Moments, RidgePath
from cramlab.consolidation.learn.ridge import scaled, unit_scale
from cramlab.consolidation.measure import DocumentLoss, mean_loss
from cramlab.hf.attention_sites import AttentionSite, affine_map, base_model


class Instead(nn.Module):
    """Stands in place of an attention sub-layer and writes no keys or values.

    Args:
        instead: map from the input of attention to the output of the sub-layer; None: the output is zero.
    """

    def __init__(self, instead: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.instead = instead

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """The output (B, T, D) for an input (B, T, D), and no attention weights."""
        return torch.zeros_like(hidden_states) if self.instead is None else self.instead(hidden_states), None


@contextlib.contextmanager
def replaced(model: nn.Module, sites: Sequence[AttentionSite], instead: Mapping[int, Instead]) -> Iterator[None]:
    """While open, other modules stand in place of some attention sub-layers, given by index in `sites`."""
    names = {id(module): name.rpartition(".")[::2] for name, module in model.named_modules()}

    def put(i: int, module: nn.Module) -> None:
        parent, child = names[id(sites[i].attention)]
        setattr(model.get_submodule(parent), child, module)

    try:
        for i, other in instead.items():
            put(i, other)
        yield
    finally:
        for i in instead:
            put(i, sites[i].attention)


def measured_without(
    model: nn.Module, tokens: Tensor, sites: Sequence[AttentionSite], which: Sequence[int],
    instead: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> DocumentLoss:  # fmt: skip
    """Measures one document on a model without some of its attention sub-layers.

    Args:
        model: the original.
        tokens: the document, (T,).
        sites: attention sub-layers of the model.
        which: indices of the sites that are replaced.
        instead: for each site, a map from the input of attention to its output; None: the outputs are zero.
    """
    others = {i: Instead(None if instead is None else instead[i]) for i in which}
    with replaced(model, sites, others):
        loss = mean_loss(model, tokens)
    share = len(which) / len(sites)
    return DocumentLoss(loss, share, 1 - share)


def linear_maps(
    sites: Sequence[AttentionSite], fit: Sequence[Moments], held_out: Sequence[Moments], strengths: Sequence[float]
) -> list[LinearProbe]:
    """Ridge regressions from the input of attention to its output, one a site.

    Args:
        sites: attention sub-layers of the model.
        fit: sums that the adapters were fitted on, see `learn.closed_form.Learner.moments`.
        held_out: sums over other documents, on which the strengths are chosen.
        strengths: ridge strengths to choose from.
    """
    probes = []
    for site, ours, others in zip(sites, fit, held_out, strict=True):
        whole = [_whole_output(site, sums) for sums in (ours, others)]
        scale = unit_scale(whole[0])
        path = RidgePath(scaled(whole[0], scale))
        probe = path.probe(path.choose(scaled(whole[1], scale), strengths)[0])
        probes.append(LinearProbe((scale[:, None] * probe.weight).float(), probe.bias.float()))
    return probes


def _whole_output(site: AttentionSite, sums: Moments) -> Moments:
    """Sums over (input, output) of attention: the output is the window's, projected, plus what the far read adds."""
    weight, bias = affine_map(site)
    hidden, near = slice(0, site.d_model), slice(site.d_model, site.d_model + site.d_heads)
    out = Moments(site.d_model, site.d_model)
    out.n, out.x, out.xx = sums.n, sums.x[hidden], sums.xx[hidden, hidden]
    out.y = sums.y + sums.x[near] @ weight + sums.n * bias
    out.xy = sums.xy[hidden] + sums.xx[hidden, near] @ weight + torch.outer(out.x, bias)
    return out


def cosine_importance(model: nn.Module, sites: Sequence[AttentionSite], documents: Sequence[Tensor]) -> Tensor:
    """One minus the mean cosine between the residual stream before and after attention, (L,), on documents (T,).

    Source: LLM-Drop (He et al. 2024).
    """
    sums, n = torch.zeros(len(sites), dtype=torch.float64), 0

    def look(i: int, seen: Seen) -> None:
        after = seen.stream + seen.answer
        sums[i] += float((1 - torch.cosine_similarity(seen.stream, after, dim=-1)).double().sum())

    for tokens in documents:
        with watching(sites, look):
            base_model(model)(input_ids=tokens[None], use_cache=False)
        n += len(tokens)
    return sums / n
