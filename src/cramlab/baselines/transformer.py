"""Full causal attention: the control against which saved reads are counted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.baselines.shared.attention import check_heads
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs
from cramlab.ops.read.attention import dense
from cramlab.ops.read.visibility import visible_places


@checked("model.mixer")
class TransformerConfig:
    """Multi-head causal self-attention.

    Attributes:
        n_heads: number of attention heads.
    """

    n_heads: Size = 4

    def build(self, d_model: int) -> CausalAttention:
        """A newly initialised layer."""
        return CausalAttention(self, d_model)


class KeyValueCache(NamedTuple):
    """Keys and values of all past tokens, (B, S, D) each, and which of them are not padding, bool (B, S)."""

    keys: Tensor
    values: Tensor
    filled: Tensor


class CausalAttention(Mixer):
    """Every token attends to itself and to all earlier ones.

    Order is known from causality and from the gaps in the shared embedding. There is no other positional encoding, so
    a model trained on short sequences can be used on long ones, as the shared curriculum requires.
    """

    def __init__(self, config: TransformerConfig, d_model: int) -> None:
        super().__init__()
        check_heads(config.n_heads, d_model)
        self.config, self.d_model = config, d_model
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: KeyValueCache | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, KeyValueCache, x.shape[0])
        q, k, v = self.w_qkv(x).chunk(3, dim=-1)
        filled = torch.ones_like(gaps, dtype=torch.bool) if valid is None else valid
        causal = state is None and valid is None
        attended = filled
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
            filled = torch.cat([state.filled, filled], dim=1)
        cache = KeyValueCache(keys=k, values=v, filled=filled)
        own = torch.arange(filled.shape[1] - x.shape[1], filled.shape[1], device=x.device)[None]
        mask = None if causal else visible_places(own, filled.shape[1], filled, None)
        y = self.w_out(dense(q, k, v, self.config.n_heads, mask, causal=causal))
        if valid is not None:
            y = torch.where(valid[..., None], y, 0.0)
        return MixerOutput(y=y, state=cache, trace=Trace.of_reads(attended, x.dtype), aux={})

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`. Every token reads, whatever `read_frac`."""
        d = self.d_model
        return Cost(
            projection_flops=float(2 * 4 * d * d * seq_len),
            read_flops=float(2 * 2 * d * (seq_len + 1) / 2 * seq_len),
            state_bytes=4 * 2 * d * seq_len,
        )
