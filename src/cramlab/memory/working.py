"""Working memory: leaky integrators over irregular gaps, and a few refinement steps per token (Eq. 2)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cramlab.config import ConfigError, Positive, Size, checked
from cramlab.ops.scan.decay import decay_scan


@checked("model.mixer.working")
class WorkingMemoryConfig:
    """Sizes of the working memory. All are ours: the paper leaves h(0), K and dt open.

    Attributes:
        d_state: width of the state.
        n_timescales: number of decay rates; each owns d_state / n_timescales channels.
        longest: longest initial time constant, in time units; the shortest is 1. The decay rates are learned.
        refine_steps: K, number of steps of Eq. 2 per token, from h(0) = the normalised state.
        refine_dt: dt of Eq. 2, the step size.
    """

    d_state: Size = 64
    n_timescales: Size = 8
    longest: Annotated[float, Field(ge=1, le=1e9)] = 1000.0
    refine_steps: Annotated[int, Field(ge=0, le=1024)] = 1
    refine_dt: Positive = 0.5

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.d_state % self.n_timescales:
            raise ConfigError(
                f"model.mixer.working.d_state = {self.d_state} is not a multiple of "
                f"model.mixer.working.n_timescales = {self.n_timescales}; change one of them"
            )

    def build(self, d_model: int) -> WorkingMemory:
        """A newly initialised memory."""
        return WorkingMemory(self, d_model)


class WorkingMemory(nn.Module):
    """A bank of leaky integrators, refined by Eq. 2. State: (B, n_timescales, d_state / n_timescales).

    Source: paper sec. 4, Eq. 2. Differs: h(0) is the normalised state of the integrators, which carry information
    from token to token; the paper leaves this open.
    """

    def __init__(self, config: WorkingMemoryConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.log_rate = nn.Parameter(self._initial_rates().log())
        self.write = nn.Linear(d_model, config.d_state, bias=False)
        self.norm = nn.LayerNorm(config.d_state, bias=False)
        self.w_tau = nn.Linear(1, config.d_state)
        self.w1 = nn.Linear(config.d_state, config.d_state, bias=False)
        self.w2 = nn.Linear(d_model, config.d_state)
        self.w_out = nn.Linear(config.d_state, d_model, bias=False)

    def _initial_rates(self) -> Tensor:
        return torch.logspace(0.0, -math.log10(self.config.longest), self.config.n_timescales)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the decay rates to their initial values. They are the only parameters outside the submodules."""
        self.log_rate.copy_(self._initial_rates().log())

    def initial_state(self, n_batch: int, like: Tensor | None = None) -> Tensor:
        """Zeros, (B, G, E), in at least 32 bits, on the device of `like`, or of the parameters if None."""
        width = self.config.d_state // self.config.n_timescales
        exact = torch.promote_types(self.log_rate.dtype, torch.float32)
        like = self.log_rate if like is None else like
        return like.new_zeros(n_batch, self.config.n_timescales, width, dtype=exact)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: Tensor,
        valid: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output of the working memory for every token.

        Args:
            x: (B, T, D); zero on padding, which leaves the state unchanged.
            gaps: time since the previous token, (B, T); zero on padding.
            valid: not needed here: a token of zeros and without a gap changes nothing.
            state: from `initial_state` or the previous call.

        Returns:
            `f_CT = W_o h(K) + x`, (B, T, D); h(K), (B, T, d_state); and the state after the last token.
        """
        u = self.write(x).unflatten(-1, state.shape[1:])  # (B, T, G, E)
        s, state = decay_scan(u, gaps, self.log_rate.exp(), state)
        h = self.norm(s.flatten(2))
        if self.config.refine_steps:
            pace = self.config.refine_dt * torch.sigmoid(self.w_tau(torch.log1p(gaps).to(x.dtype)[..., None]))
            drive = self.w2(x)
            for _ in range(self.config.refine_steps):
                h = h + pace * torch.tanh(self.w1(h) + drive)
        return self.w_out(h) + x, h, state

    def product_flops(self, d_model: int, full: int, half: int) -> float:
        """FLOPs of the matrix products per token: with a gradient to the input times `full`, without times `half`."""
        d_state = self.config.d_state
        flops = full * 2 * d_model * d_state * 2  # in and out
        if self.config.refine_steps:
            flops += full * 2 * d_state * (d_model + self.config.refine_steps * d_state) + half * 2 * d_state
        return float(flops)

    @property
    def state_size(self) -> int:
        """Numbers in the state of a sequence."""
        return self.config.d_state


class NoWorkingMemory(nn.Module):
    """An ablation: the output is the token itself. State: (B, 0)."""

    def initial_state(self, n_batch: int, like: Tensor | None = None) -> Tensor:
        """An empty state, (B, 0)."""
        return torch.zeros(n_batch, 0, device=None if like is None else like.device)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,  # noqa: ARG002
        state: Tensor,
        valid: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Implements `WorkingMemory.forward`. h(K) is a single zero per token."""
        return x, torch.zeros_like(x[..., :1]), state

    def product_flops(self, d_model: int, full: int, half: int) -> float:  # noqa: ARG002
        """Zero, see `WorkingMemory.product_flops`. Nothing is multiplied."""
        return 0.0

    @property
    def state_size(self) -> int:
        """Nothing is held."""
        return 0
