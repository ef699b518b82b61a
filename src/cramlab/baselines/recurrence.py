"""Recurrence only: a selective state-space mixer with the parametrisation of Mamba-2, without attention.

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060. Differs: the scan is plain PyTorch, chunk by chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.baselines.shared.packing import last_tokens, pack
from cramlab.config import Size, checked
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing, Trace, check_state, checked_inputs, nothing_mixed


@checked("model.mixer")
class RecurrenceConfig:
    """Sizes, as in Mamba-2 with one group.

    Attributes:
        d_state: size of the state of each channel.
        expand: inner width divided by the model's width.
        d_head: number of channels that share a decay rate.
        d_conv: number of tokens that the convolution before the recurrence sees.
    """

    d_state: Size = 64
    expand: Size = 2
    d_head: Size = 64
    d_conv: Size = 4

    def build(self, d_model: int) -> SelectiveRecurrence:
        """A newly initialised layer."""
        return SelectiveRecurrence(self, d_model)


def selective_scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Solves `S[t] = exp(log_decay[t]) S[t-1] + x[t] b[t]^T`, `y[t] = S[t] c[t]` for all t, chunk by chunk.

    Args:
        x: inputs, (B, T, H, P).
        log_decay: logarithm of the decay, <= 0, (B, T, H).
        b: input vectors, (B, T, N).
        c: output vectors, (B, T, N).
        state: S before the first token, (B, H, P, N).
        chunk: number of tokens solved by one matrix product.

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
    kept = torch.exp(total[..., -1:] - total)  # (B, n, H, C): share of each input at the chunk's end
    added = (heads * kept[..., None]).transpose(-1, -2) @ b[:, :, None]  # (B, n, H, P, N)
    decay = torch.exp(total)  # of the state before the chunk
    before = []
    # `unbind`, because the gradient of a slice is as large as the sliced tensor, and that of n slices n times as large.
    for chunk_decay, chunk_added in zip(decay[..., -1, None, None].unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = chunk_decay * state + chunk_added
    carried = c[:, :, None] @ torch.stack(before, dim=1).transpose(-1, -2)  # (B, n, H, C, P)
    y = within + decay[..., None] * carried
    return y.transpose(2, 3).flatten(1, 2)[:, :n_tokens], state


class RecurrenceState(NamedTuple):
    """The last inputs of the convolution, (B, d_conv - 1, C), and the state of the scan, (B, H, P, N)."""

    recent: Tensor
    scan: Tensor


class SelectiveRecurrence(Mixer):
    """Mamba-2's mixer. Gaps reach it through the shared embedding, on which its decay rates depend."""

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
        """State before the first token."""
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
        """Implements `Mixer.forward`. `routing` has no effect."""
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
        # A step of length 0 writes nothing and forgets nothing, so padding leaves the state unchanged.
        step = F.softplus(step + self.step_bias) * packed.valid[..., None]
        heads = inner.unflatten(-1, (self.n_heads, -1))
        y, scan = selective_scan(heads * step[..., None], -step * self.log_rate.exp(), b, c, state.scan)
        y = (y + self.skip[:, None] * heads).flatten(2)
        y = packed.unpack(self.w_out(self.norm(y * F.silu(z))))
        nobody = torch.zeros_like(gaps, dtype=torch.bool)
        trace = Trace.of_reads(nobody, x.dtype)
        return MixerOutput(y=y, state=RecurrenceState(recent=recent, scan=scan), trace=trace, aux={})

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Implements `Mixer.cost`. Nothing is read, whatever `read_frac`. Only matrix products are counted."""
        c, d, inner = self.config, self.d_model, self.d_inner
        chunk = min(64, seq_len)
        per_token = 2 * d * (inner + self.n_channels + self.n_heads) + 2 * inner * d
        per_token += 2 * self.n_channels * c.d_conv
        per_token += 2 * chunk * (c.d_state + inner) + 2 * 2 * inner * c.d_state  # within and between the chunks
        state = self.n_channels * (c.d_conv - 1) + inner * c.d_state
        return Cost(projection_flops=float(per_token * seq_len), read_flops=0.0, state_bytes=4 * state)
