"""TransMamba-like position switch: the first tokens attend and all later ones recur, with the same projections.

Source: Li et al., "TransMamba", arXiv 2503.24067. Differs: one switch for all layers, and the recurrence starts
at the first token, which is what their memory converter computes at the switch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.baselines.recurrence import selective_scan
from cramlab.baselines.shared.attention import check_heads
from cramlab.baselines.shared.packing import pack
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs
from cramlab.ops.read.attention import dense


@checked("model.mixer")
class TransMambaConfig:
    """Attention up to a position, recurrence after it.

    Attributes:
        n_heads: number of heads, of attention and of the recurrence.
        switch_at: number of tokens of a sequence that attend.
    """

    n_heads: Size = 4
    switch_at: Size = 128

    def build(self, d_model: int) -> TransMamba:
        """A newly initialised layer."""
        return TransMamba(self, d_model)


class TransMambaState(NamedTuple):
    """Keys and values of the first tokens, (B, switch_at, D); number of tokens, (B,); scan state, (B, H, Dh, D)."""

    keys: Tensor
    values: Tensor
    n_before: Tensor
    scan: Tensor


class TransMamba(Mixer):
    """Queries, keys and values are those of attention, and C, B and x of the recurrence."""

    def __init__(self, config: TransMambaConfig, d_model: int) -> None:
        super().__init__()
        check_heads(config.n_heads, d_model)
        self.config, self.d_model = config, d_model
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_step = nn.Linear(d_model, config.n_heads)
        self.log_rate = nn.Parameter(torch.linspace(1.0, 16.0, config.n_heads).log())
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.w_out = nn.Linear(d_model, d_model, bias=False)
        nn.init.constant_(self.w_step.bias, -4.0)  # steps of about 0.02, for a memory of tens to hundreds of tokens

    def initial_state(self, n_batch: int) -> TransMambaState:
        """State before the first token."""
        zeros = self.log_rate.new_zeros
        keys = zeros(n_batch, self.config.switch_at, self.d_model)
        scan = zeros(n_batch, self.config.n_heads, self.d_model // self.config.n_heads, self.d_model)
        return TransMambaState(keys=keys, values=keys, n_before=zeros(n_batch, dtype=torch.int64), scan=scan)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: TransMambaState | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`. `routing` has no effect."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, TransMambaState, x.shape[0])
        state = state or self.initial_state(x.shape[0])
        packed = pack(x, valid)
        q, k, v = self.w_qkv(packed.x).chunk(3, dim=-1)
        position = state.n_before[:, None] + torch.arange(x.shape[1], device=x.device)
        early = (position < self.config.switch_at) & packed.valid
        held = self._held(state, k, v, position, early)
        attended = self._attend(q, held, position, early)
        step = F.softplus(self.w_step(packed.x)) * packed.valid[..., None]
        heads = v.unflatten(-1, (self.config.n_heads, -1)) * step[..., None]
        scale = self.d_model**-0.5
        recurred, scan = selective_scan(heads, -step * self.log_rate.exp(), k * scale, q, state.scan)
        y = self.w_out(self.norm(torch.where(early[..., None], attended, recurred.flatten(2))))
        trace = Trace.of_reads(packed.unpack(early.to(x.dtype)).bool(), x.dtype)
        keys, values = held
        after = TransMambaState(keys=keys, values=values, n_before=state.n_before + packed.lengths, scan=scan)
        return MixerOutput(y=packed.unpack(y), state=after, trace=trace, aux={})

    def _held(
        self, state: TransMambaState, k: Tensor, v: Tensor, position: Tensor, early: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens, including those of this call, (B, switch_at, D) each."""
        spare = torch.where(early, position, self.config.switch_at)[..., None].expand_as(
            k
        )  # one more slot, for the other tokens
        keys, values = (
            torch.cat([old, old[:, :1]], dim=1).scatter(1, spare, new)[:, :-1]
            for old, new in ((state.keys, k), (state.values, v))
        )
        return keys, values

    def _attend(self, q: Tensor, held: tuple[Tensor, Tensor], position: Tensor, early: Tensor) -> Tensor:
        """Causal attention for the first tokens of a sequence, (B, T, D). Zero for the others, which are not scored."""
        n_early = int(early.sum(dim=1).max()) if early.numel() else 0
        if n_early == 0:
            return torch.zeros_like(q)
        places = torch.arange(self.config.switch_at, device=q.device)
        mask = places <= position[:, :n_early, None]  # a token that is not early sees all slots, and is dropped
        y = dense(q[:, :n_early], *held, self.config.n_heads, mask)
        return F.pad(y, (0, 0, 0, q.shape[1] - n_early))

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`. The first `switch_at` tokens read, whatever `read_frac`."""
        d, switch, chunk = self.d_model, self.config.switch_at, min(64, seq_len)
        per_token = 2 * 4 * d * d + 2 * d * self.config.n_heads
        per_token += 2 * chunk * 2 * d + 2 * 2 * d * d  # the scan, within and between the chunks
        return Cost(
            projection_flops=float(per_token * seq_len),
            read_flops=float(2 * 2 * d * switch * min(switch, seq_len)),
            state_bytes=4 * (2 * d * switch + d * d),
        )
