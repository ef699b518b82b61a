"""SeqBoat-like sparse modular activation: a recurrence for all tokens, attention for those that a router activates.

Source: Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", NeurIPS 2023. Differs: the recurrence
is the selective one of `recurrence.py` instead of a moving average; attention has several heads and no local window.
"""

from __future__ import annotations

from dataclasses import field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.baselines.recurrence import RecurrenceConfig, RecurrenceState
from cramlab.baselines.shared.attention import check_heads
from cramlab.baselines.shared.selected import SelectedAttention, SelectedCache
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs


@checked("model.mixer")
class SeqBoatConfig:
    """A recurrence, a router, and attention among the activated tokens.

    Attributes:
        n_heads: number of attention heads.
        recurrence: sizes of the recurrence.
    """

    n_heads: Size = 4
    recurrence: RecurrenceConfig = field(default_factory=RecurrenceConfig)

    def build(self, d_model: int) -> SeqBoat:
        """A newly initialised layer."""
        return SeqBoat(self, d_model)


class SeqBoatState(NamedTuple):
    """State of the recurrence, and keys and values of the activated tokens so far."""

    recurrence: RecurrenceState
    cache: SelectedCache


class SeqBoat(Mixer):
    """A token is active if `softmax(u / T)` prefers it, and its attention is scaled by that probability.

    The scale is how the router learns, without a sparsity loss and without noise. T is learned.
    """

    def __init__(self, config: SeqBoatConfig, d_model: int) -> None:
        super().__init__()
        check_heads(config.n_heads, d_model)
        self.config, self.d_model = config, d_model
        self.recurrence = config.recurrence.build(d_model)
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.router = nn.Linear(d_model, 2)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.attention = SelectedAttention(d_model, config.n_heads)
        # All tokens start active: an inactive token sends no gradient to the router and could stay inactive for ever.
        nn.init.zeros_(self.router.weight)
        self.router.bias.data = torch.tensor([0.0, 1.0])

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: SeqBoatState | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect: the published router decides from the first step."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, SeqBoatState, x.shape[0])
        before = state or SeqBoatState(
            recurrence=self.recurrence.initial_state(x.shape[0]), cache=self.attention.initial_cache(x.shape[0])
        )
        recurred = self.recurrence(x, gaps, before.recurrence, valid=valid)
        h = self.norm(x + recurred.y)
        probability = torch.softmax(self.router(h) / self.log_temperature.exp(), dim=-1)[..., 1]  # of activation
        active = probability > 0.5
        if valid is not None:
            active = active & valid
        attended, cache = self.attention(h, active, before.cache)
        trace = Trace.of_reads(active, x.dtype)._replace(gate_prob=probability.detach())
        return MixerOutput(
            y=recurred.y + probability[..., None] * attended,
            state=SeqBoatState(recurrence=recurred.state, cache=cache),
            trace=trace,
            aux={},
        )

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`."""
        recurrence, attention = self.recurrence.cost(seq_len), self.attention.cost(seq_len, read_frac)
        return Cost(
            projection_flops=recurrence.projection_flops
            + attention.projection_flops
            + 2 * 2 * self.d_model * seq_len,  # the router
            read_flops=attention.read_flops,
            state_bytes=recurrence.state_bytes + attention.state_bytes,
        )
