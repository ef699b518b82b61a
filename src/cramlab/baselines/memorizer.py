"""Weights alone: no token sees another, so this measures what memorising the training set can reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs


@checked("model.mixer")
class MemorizerConfig:
    """A token-wise MLP in place of a mixer.

    Attributes:
        d_hidden: hidden width; 256 gives as many parameters as full attention at the default width of 128.
    """

    d_hidden: Size = 256

    def build(self, d_model: int) -> Memorizer:
        """A newly initialised layer."""
        return Memorizer(self, d_model)


class Memorizer(Mixer):
    """`W_out silu(W_in x)`, token by token; it has no state."""

    def __init__(self, config: MemorizerConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.w_in = nn.Linear(d_model, config.d_hidden)
        self.w_out = nn.Linear(config.d_hidden, d_model)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: Any = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, type(None), x.shape[0])
        y = self.w_out(F.silu(self.w_in(x)))
        if valid is not None:
            y = torch.where(valid[..., None], y, 0.0)
        nobody = torch.zeros_like(gaps, dtype=torch.bool)
        return MixerOutput(y=y, state=None, trace=Trace.of_reads(nobody, x.dtype), aux={})

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`. Nothing is read."""
        return Cost(
            projection_flops=float(2 * 2 * self.d_model * self.config.d_hidden * seq_len), read_flops=0.0, state_bytes=0
        )
