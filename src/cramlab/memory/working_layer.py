"""A layer with a working memory and nothing else: a CRAM layer that neither writes, reads nor consolidates."""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor

from cramlab.config import checked
from cramlab.memory.buffer import empty_buffer
from cramlab.memory.delta import DeltaMemoryConfig
from cramlab.memory.layer import CRAMState
from cramlab.memory.working import WorkingMemoryConfig
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs


@checked("model.mixer")
class WorkingLayerConfig:
    """Config of a layer that has only a working memory.

    Attributes:
        working: `WorkingMemoryConfig` (leaky integrators) or `DeltaMemoryConfig` (a gated delta rule).
    """

    working: WorkingMemoryConfig | DeltaMemoryConfig = field(default_factory=WorkingMemoryConfig)

    def build(self, d_model: int) -> WorkingLayer:
        """A newly initialised layer."""
        return WorkingLayer(self, d_model)


class WorkingLayer(Mixer):
    """Every token gets the output of the working memory.

    Its state is a `CRAMState` with an empty buffer. Source: ours.
    """

    def __init__(self, config: WorkingLayerConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.working = config.working.build(d_model)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: CRAMState | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,  # noqa: ARG002
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, CRAMState, len(x))
        if state is None:
            state = CRAMState(self.working.initial_state(len(x), x), empty_buffer(len(x), x))
        y, _, working = self.working(x, gaps, state.working, valid)
        return MixerOutput(
            y=y if valid is None else torch.where(valid[..., None], y, 0.0),
            state=state._replace(working=working),
            trace=Trace.of_reads(torch.zeros_like(gaps, dtype=torch.bool), x.dtype),
            aux={},
        )

    def cost(self, seq_len: int, *, read_frac: float = 0.0) -> Cost:  # noqa: ARG002
        """Implements `Mixer.cost`. No token reads, whatever `read_frac`."""
        flops = seq_len * self.working.product_flops(self.d_model, 1, 1)
        return Cost(
            projection_flops=flops,
            read_flops=0.0,
            state_bytes=4 * self.working.state_size,
            parameter_bytes=sum(p.numel() * p.element_size() for p in self.parameters()),
            parts={"working memory": flops},
        )
