"""Attention among selected tokens only: gather them, attend causally, scatter back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.baselines.shared.attention import check_heads
from cramlab.mixer import Cost
from cramlab.ops.read.attention import dense
from cramlab.ops.read.visibility import visible_places


class SelectedCache(NamedTuple):
    """Keys and values of the selected past tokens, (B, S, D) each, and which slots are filled, bool (B, S)."""

    keys: Tensor
    values: Tensor
    filled: Tensor


class SelectedAttention(nn.Module):
    """Causal attention among the selected tokens. The others get no queries, keys or values."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        check_heads(n_heads, d_model)
        self.d_model, self.n_heads = d_model, n_heads
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)

    def initial_cache(self, n_batch: int) -> SelectedCache:
        """Cache without entries."""
        empty = self.w_out.weight.new_zeros(n_batch, 0, self.d_model)
        return SelectedCache(keys=empty, values=empty, filled=empty[..., 0].bool())

    def forward(self, x: Tensor, selected: Tensor, cache: SelectedCache) -> tuple[Tensor, SelectedCache]:
        """Attends among the selected tokens of x (B, T, D) and those of the cache.

        Args:
            x: tokens, (B, T, D).
            selected: bool (B, T).
            cache: from `initial_cache` or the previous call.

        Returns:
            (B, T, D), zero where a token was not selected, and the cache with the selected tokens added.
        """
        counts = selected.sum(dim=1)
        n_most = int(counts.max()) if selected.numel() else 0
        order = (~selected).to(torch.int8).argsort(dim=1, stable=True)[:, :n_most]  # (B, R), the selected tokens first
        wide = order[..., None].expand(-1, -1, self.d_model)
        real = torch.arange(n_most, device=x.device) < counts[:, None]
        q, k, v = self.w_qkv(x.gather(1, wide)).chunk(3, dim=-1)
        k, v = torch.cat([cache.keys, k], dim=1), torch.cat([cache.values, v], dim=1)
        filled = torch.cat([cache.filled, real], dim=1)
        own = torch.arange(filled.shape[1] - n_most, filled.shape[1], device=x.device)[None]
        mask = visible_places(own, filled.shape[1], filled, None)
        y = self.w_out(dense(q, k, v, self.n_heads, mask))
        y = torch.zeros_like(x).scatter(1, wide, torch.where(real[..., None], y, 0.0))
        return y, SelectedCache(keys=k, values=v, filled=filled)

    def cost(self, seq_len: int, read_frac: float) -> Cost:
        """Cost on one sequence of which `read_frac` is selected; every selected token scores all selected tokens."""
        n, d = seq_len * read_frac, self.d_model
        return Cost(projection_flops=2 * 4 * d * d * n, read_flops=2 * 2 * d * n * n, state_bytes=round(4 * 2 * d * n))
