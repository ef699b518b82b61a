"""Full causal attention: the control against which every saved read is counted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.baselines.attention import attend, check_heads
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs


@checked("model.mixer")
class TransformerConfig:
    """Multi-head causal self-attention.

    Attributes:
        n_heads: attention heads.
    """

    n_heads: Size = 4

    def build(self, d_model: int) -> CausalAttention:
        """A fresh layer."""
        return CausalAttention(self, d_model)


class KeyValueCache(NamedTuple):
    """Keys and values of all past tokens, (B, S, D) each, and which of them are not padding, (B, S)."""

    keys: Tensor
    values: Tensor
    filled: Tensor


class CausalAttention(Mixer):
    """Every token attends to itself and to all earlier ones.

    Order is known through causality and through the gaps that the shared embedding is told; there is no further
    positional encoding, which lets it be trained short and used long, as the shared curriculum asks.
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
        """See `Mixer.forward`. `routing` changes nothing here."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, KeyValueCache, x.shape[0])
        q, k, v = self.w_qkv(x).chunk(3, dim=-1)
        filled = torch.ones_like(gaps, dtype=torch.bool) if valid is None else valid
        plain = state is None and valid is None
        attended = filled
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
            filled = torch.cat([state.filled, filled], dim=1)
        cache = KeyValueCache(keys=k, values=v, filled=filled)
        mask = None if plain else self._mask(filled, x.shape[1])
        y = self.w_out(attend(q, k, v, self.config.n_heads, mask))
        if valid is not None:
            y = torch.where(valid[..., None], y, 0.0)
        return MixerOutput(y=y, state=cache, trace=Trace.of_reads(attended, x.dtype), aux={})

    @staticmethod
    def _mask(filled: Tensor, n_tokens: int) -> Tensor:
        """Bool (B, T, S): earlier and not padding; a token always sees itself, so that no row is empty."""
        places = torch.arange(filled.shape[1], device=filled.device)
        own = places[-n_tokens:, None]
        return (filled[:, None] & (places <= own)) | (places == own)

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """See `Mixer.cost`; every token reads, whatever `read_frac`."""
        d = self.d_model
        return Cost(
            projection_flops=float(2 * 4 * d * d * seq_len),
            read_flops=float(2 * 2 * d * (seq_len + 1) / 2 * seq_len),
            state_bytes=4 * 2 * d * seq_len,
        )
