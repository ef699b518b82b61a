"""Sliding-window attention: every token reads, but only from the last few tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.baselines.shared.attention import check_heads
from cramlab.baselines.shared.packing import last_tokens, pack
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs, nothing_mixed
from cramlab.ops.read.attention import dense


@checked("model.mixer")
class SlidingWindowConfig:
    """Causal attention over a window.

    Attributes:
        n_heads: number of attention heads.
        window: number of tokens seen, including the token itself.
    """

    n_heads: Size = 4
    window: Size = 64

    def build(self, d_model: int) -> SlidingWindowAttention:
        """A newly initialised layer."""
        return SlidingWindowAttention(self, d_model)


class RecentTokens(NamedTuple):
    """Keys and values of the last `window` tokens, (B, window, D) each, and which are filled, bool (B, window)."""

    keys: Tensor
    values: Tensor
    filled: Tensor


class SlidingWindowAttention(Mixer):
    """A token attends to itself and to the `window - 1` tokens before it. Scored block by block, in O(T window)."""

    def __init__(self, config: SlidingWindowConfig, d_model: int) -> None:
        super().__init__()
        check_heads(config.n_heads, d_model)
        self.config, self.d_model = config, d_model
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: RecentTokens | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, RecentTokens, x.shape[0])
        window = self.config.window
        if state is None:
            empty = x.new_zeros(x.shape[0], window, self.d_model)
            state = RecentTokens(keys=empty, values=empty, filled=torch.zeros_like(empty[..., 0], dtype=torch.bool))
        if not x.numel():
            return nothing_mixed(x, gaps, state)
        packed = pack(x, valid)
        q, k, v = self.w_qkv(packed.x).chunk(3, dim=-1)
        k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
        filled = torch.cat([state.filled, packed.valid], dim=1)
        y = packed.unpack(self.w_out(self._blockwise(q, k, v, filled)))
        keys, values = (last_tokens(t, packed.lengths, window) for t in (k, v))
        last_filled = last_tokens(filled[..., None], packed.lengths, window)[..., 0]
        attended = torch.ones_like(gaps, dtype=torch.bool) if valid is None else valid
        return MixerOutput(
            y=y,
            state=RecentTokens(keys=keys, values=values, filled=last_filled),
            trace=Trace.of_reads(attended, x.dtype),
            aux={},
        )

    def _blockwise(self, q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
        """Attention of blocks of `window` queries to their own block of keys and the one before, (B, T, D).

        Args:
            q: (B, T, D).
            k: keys of the state, then of these tokens, (B, window + T, D).
            v: values, likewise.
            filled: bool (B, window + T).
        """
        n_batch, n_tokens, _ = q.shape
        window = self.config.window
        padding = -n_tokens % window
        q, k, v = (F.pad(t, (0, 0, 0, padding)) for t in (q, k, v))
        filled = F.pad(filled, (0, padding))
        q = q.view(-1, window, self.d_model)  # (B n, window, D)
        k, v = (t.unfold(1, 2 * window, window).transpose(-1, -2).flatten(0, 1) for t in (k, v))  # (B n, 2 window, D)
        seen = filled.unfold(1, 2 * window, window).flatten(0, 1)[:, None]  # (B n, 1, 2 window)
        own = torch.arange(window, 2 * window, device=q.device)[:, None]
        place = torch.arange(2 * window, device=q.device)
        mask = (seen & (place <= own) & (place > own - window)) | (place == own)
        return dense(q, k, v, self.config.n_heads, mask).view(n_batch, -1, self.d_model)[:, :n_tokens]

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`. Every token scores two blocks of `window` tokens, whatever `read_frac`."""
        d, window = self.d_model, self.config.window
        n_scored = -(-seq_len // window) * window
        return Cost(
            projection_flops=float(2 * 4 * d * d * seq_len),
            read_flops=float(2 * 2 * d * 2 * window * n_scored),
            state_bytes=4 * 2 * d * window,
        )
