"""Static baselines as they would be executed, to be timed.

`cramlab.retrofit.baselines` has their twins, which compute everything and choose afterwards; the answers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.consolidated import ConsolidatedAttention
from cramlab.hf.far_reads import Padding, window_read


class SplitHeads(ConsolidatedAttention):
    """Some heads see window and first tokens, the others everything; keys are read if one of their heads is full.

    After DuoAttention (Xiao et al. 2024); with no full head, a window everywhere.
    """

    windowed: Tensor  # bool (H,)

    def attend(
        self,
        original: Callable[[], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """See the parent; nothing is added to the layer's answer."""
        if not self.windowed.any():
            return original()
        heads = window_read(query, key, value, window=self.window, n_sinks=self.n_sinks, scale=scale,
                            padding=Padding.of(mask)).heads  # fmt: skip
        n_tokens, n_keys = query.shape[2], key.shape[2]
        if mask is None and 1 < n_tokens < n_keys:
            mask = torch.ones(n_tokens, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_tokens)
        for group, windowed in enumerate(self.windowed.view(key.shape[1], -1)):
            full = (~windowed).nonzero().squeeze(1) + group * len(windowed)
            if len(full):
                keys, values = (part[:, group : group + 1].expand(-1, len(full), -1, -1) for part in (key, value))
                heads[:, :, full] = F.scaled_dot_product_attention(
                    query[:, full], keys, values, attn_mask=mask, is_causal=mask is None and n_tokens > 1, scale=scale
                ).transpose(1, 2)
        return heads


def split_heads(sites: Sequence[AttentionSite], windowed: Tensor, window: int, n_sinks: int) -> dict[int, SplitHeads]:
    """To be installed; windowed: bool (L, H)."""
    layers = {}
    for site, of_layer in zip(sites, windowed, strict=True):
        layer = SplitHeads.beside(site, rank=0, window=window, n_sinks=n_sinks)
        assert isinstance(layer, SplitHeads)
        layer.windowed = of_layer
        layers[site.layer] = layer
    return layers


class Instead(nn.Module):
    """In place of a whole attention sub-layer: silence, or a map of what it sees. No keys or values are written."""

    def __init__(self, instead: nn.Module | None = None) -> None:
        super().__init__()
        self.instead = instead

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Answer (B, T, D) to what attention sees, and no weights."""
        return torch.zeros_like(hidden_states) if self.instead is None else self.instead(hidden_states), None


def replace(model: nn.Module, site: AttentionSite, instead: Instead) -> None:
    """Puts it where the site's attention was."""
    (name,) = (name for name, module in model.named_modules() if module is site.attention)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, instead)
