"""Mixture of depths: a token enters attention if its router score exceeds a threshold, and skips it otherwise.

Source: Raposo et al., "Mixture-of-Depths", arXiv 2404.02258. Differs: the threshold is causal (their top-k is not: it
cannot route one token at a time), so a hinge loss holds the share at the capacity; and the MLP is not skipped, since
all models here share it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cramlab.baselines.shared.selected import SelectedAttention, SelectedCache
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs
from cramlab.ranks import count_over_ranks, share_over_ranks


@checked("model.mixer")
class MixtureOfDepthsConfig:
    """A threshold router, and attention among the tokens that it selects.

    Attributes:
        n_heads: number of attention heads.
        capacity: share of tokens that may be selected without a penalty, 0 to 1; the paper's best is 0.125.
    """

    n_heads: Size = 4
    capacity: Annotated[float, Field(gt=0, le=1)] = 0.125

    def build(self, d_model: int) -> MixtureOfDepths:
        """A newly initialised layer."""
        return MixtureOfDepths(self, d_model)


class MixtureOfDepths(Mixer):
    """Scales attention by the router score, which is how the router learns; "capacity" in `aux` is the hinge loss."""

    def __init__(self, config: MixtureOfDepthsConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.router = nn.Linear(d_model, 1)
        self.attention = SelectedAttention(d_model, config.n_heads)
        nn.init.zeros_(self.router.weight)  # selects all tokens at first
        nn.init.ones_(self.router.bias)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: SelectedCache | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect: the hinge loss applies from the first step."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, SelectedCache, x.shape[0])
        score = torch.sigmoid(self.router(x)).squeeze(-1)
        real = torch.ones_like(gaps, dtype=torch.bool) if valid is None else valid
        selected = (score > 0.5) & real
        attended, cache = self.attention(x, selected, state or self.attention.initial_cache(x.shape[0]))
        share = share_over_ranks((score * real).sum() / count_over_ranks(real.sum()))
        return MixerOutput(
            y=score[..., None] * attended,
            state=cache,
            trace=Trace.of_reads(selected, x.dtype)._replace(gate_prob=score.detach()),
            aux={"capacity": torch.relu(share - self.config.capacity)},
        )

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`."""
        attention = self.attention.cost(seq_len, read_frac)
        return Cost(
            projection_flops=attention.projection_flops + 2 * self.d_model * seq_len,
            read_flops=attention.read_flops,
            state_bytes=attention.state_bytes,
        )
