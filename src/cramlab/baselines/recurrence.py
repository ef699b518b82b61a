"""Recurrence only: a selective state-space mixer with the parametrisation of Mamba-2, and no attention at all.

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060. Differs: plain PyTorch, a scan chunk by chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.baselines.packing import last_tokens, pack
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs, nothing_mixed


@checked("model.mixer")
class RecurrenceConfig:
    """Sizes, as in Mamba-2 with one group.

    Attributes:
        d_state: numbers that each channel keeps.
        expand: inner width over the model's.
        d_head: channels that share a decay rate.
        d_conv: tokens seen by the convolution before the recurrence.
    """

    d_state: Size = 64
    expand: Size = 2
    d_head: Size = 64
    d_conv: Size = 4

    def build(self, d_model: int) -> SelectiveRecurrence:
        """A fresh layer."""
        return SelectiveRecurrence(self, d_model)


def selective_scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Solves `S[t] = exp(log_decay[t]) S[t-1] + x[t] b[t]^T`, `y[t] = S[t] c[t]` for all t, chunk by chunk.

    Args:
        x: inputs, (B, T, H, P).
        log_decay: <= 0, (B, T, H).
        b: where inputs are written, (B, T, N).
        c: where outputs are taken from, (B, T, N).
        state: S before the first token, (B, H, P, N).
        chunk: tokens solved by one matrix product.

    Returns:
        y, (B, T, H, P), and S after the last token.
    """
    n_tokens = x.shape[1]
    if n_tokens == 0:
        return x, state
    size = min(chunk, n_tokens)
    padding = -n_tokens % size
    x, log_decay = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(log_decay, (0, 0, 0, padding))
    b, c = F.pad(b, (0, 0, 0, padding)), F.pad(c, (0, 0, 0, padding))
    x, log_decay, b, c = (t.unflatten(1, (-1, size)) for t in (x, log_decay, b, c))  # (B, n, C, ...)
    total = log_decay.transpose(2, 3).cumsum(dim=-1)  # (B, n, H, C)
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf)
    kernel = torch.exp(between) * (c @ b.transpose(-1, -2))[:, :, None]  # (B, n, H, C, C)
    heads = x.transpose(2, 3)  # (B, n, H, C, P)
    within = kernel @ heads
    kept = torch.exp(total[..., -1:] - total)  # (B, n, H, C): of each input at the chunk's end
    added = (heads * kept[..., None]).transpose(-1, -2) @ b[:, :, None]  # (B, n, H, P, N)
    fading = torch.exp(total)  # of what came before the chunk
    before = []
    # Unbound at once: the gradient of a slice is as large as what it was cut from, that of n slices n times so.
    for fades, chunk_added in zip(fading[..., -1, None, None].unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = fades * state + chunk_added
    carried = c[:, :, None] @ torch.stack(before, dim=1).transpose(-1, -2)  # (B, n, H, C, P)
    y = within + fading[..., None] * carried
    return y.transpose(2, 3).flatten(1, 2)[:, :n_tokens], state


class RecurrenceState(NamedTuple):
    """Last inputs of the convolution, (B, d_conv - 1, C), and the scan's state, (B, H, P, N)."""

    recent: Tensor
    scan: Tensor


class SelectiveRecurrence(Mixer):
    """Mamba-2's mixer. It is told the gaps by the shared embedding, on which its decay rates depend."""

    def __init__(self, config: RecurrenceConfig, d_model: int) -> None:
        super().__init__()
        d_inner = config.expand * d_model
        if d_inner % config.d_head:
            raise ValueError(
                f"model.mixer.d_head = {config.d_head} does not divide expand x model.d_model = {d_inner}; change one"
            )
        self.config, self.d_model, self.d_inner = config, d_model, d_inner
        self.n_heads = d_inner // config.d_head
        self.n_channels = d_inner + 2 * config.d_state
        self.w_in = nn.Linear(d_model, d_inner + self.n_channels + self.n_heads, bias=False)
        self.conv = nn.Conv1d(self.n_channels, self.n_channels, config.d_conv, groups=self.n_channels)
        step = torch.logspace(math.log10(0.001), math.log10(0.1), self.n_heads)
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.log_rate = nn.Parameter(torch.linspace(1.0, 16.0, self.n_heads).log())
        self.skip = nn.Parameter(torch.ones(self.n_heads))
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.w_out = nn.Linear(d_inner, d_model, bias=False)

    def initial_state(self, n_batch: int) -> RecurrenceState:
        """Nothing remembered."""
        zeros = self.log_rate.new_zeros
        return RecurrenceState(
            recent=zeros(n_batch, self.config.d_conv - 1, self.n_channels),
            scan=zeros(n_batch, self.n_heads, self.config.d_head, self.config.d_state),
        )

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: RecurrenceState | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """See `Mixer.forward`. `routing` changes nothing here."""
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, RecurrenceState, x.shape[0])
        state = state or self.initial_state(x.shape[0])
        if not x.numel():
            return nothing_mixed(x, gaps, state)
        packed = pack(x, valid)
        z, channels, step = self.w_in(packed.x).split([self.d_inner, self.n_channels, self.n_heads], dim=-1)
        channels = torch.cat([state.recent, channels], dim=1)
        recent = last_tokens(channels, packed.lengths, self.config.d_conv - 1)
        mixed = F.silu(self.conv(channels.transpose(1, 2)).transpose(1, 2))
        inner, b, c = mixed.split([self.d_inner, self.config.d_state, self.config.d_state], dim=-1)
        # A step of no length writes nothing and forgets nothing: padding leaves the state as it is.
        step = F.softplus(step + self.step_bias) * packed.valid[..., None]
        heads = inner.unflatten(-1, (self.n_heads, -1))
        y, scan = selective_scan(heads * step[..., None], -step * self.log_rate.exp(), b, c, state.scan)
        y = (y + self.skip[:, None] * heads).flatten(2)
        y = packed.unpack(self.w_out(self.norm(y * F.silu(z))))
        nobody = torch.zeros_like(gaps, dtype=torch.bool)
        trace = Trace.of_reads(nobody, x.dtype)
        return MixerOutput(y=y, state=RecurrenceState(recent=recent, scan=scan), trace=trace, aux={})

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """See `Mixer.cost`; nothing is read, whatever `read_frac`. Only matrix products are counted."""
        c, d, inner = self.config, self.d_model, self.d_inner
        chunk = min(64, seq_len)
        per_token = 2 * d * (inner + self.n_channels + self.n_heads) + 2 * inner * d
        per_token += 2 * self.n_channels * c.d_conv
        per_token += 2 * chunk * (c.d_state + inner) + 2 * 2 * inner * c.d_state  # within and between the chunks
        state = self.n_channels * (c.d_conv - 1) + inner * c.d_state
        return Cost(projection_flops=float(per_token * seq_len), read_flops=0.0, state_bytes=4 * state)
