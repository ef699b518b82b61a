"""Working memory: leaky integrators over irregular gaps, then a few refinement steps per token (Eq. 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cramlab.memory import launches

_NEVER = 1e30  # a time after which nothing is left; finite, as an infinity times a zero gradient would be NaN


def elapsed_within(gaps: Tensor) -> Tensor:
    """Time from each earlier token of a chunk to each later one.

    Summed pair by pair and not as a difference of clock times, so that small gaps survive after a huge one.

    Args:
        gaps: time since the previous token, (..., C).

    Returns:
        (..., C, C); entry [i, j] is the time from j to i for i >= j and `_NEVER` above the diagonal.
    """
    size = gaps.shape[-1]
    pairs = torch.ones(size, size, dtype=torch.bool, device=gaps.device)
    elapsed = torch.where(pairs.tril(-1), gaps[..., :, None], 0.0).cumsum(dim=-2)
    return elapsed.masked_fill(pairs.triu(1), _NEVER)


_LONG_CHUNK = 512  # chunks that are solved together where launches bind


def scan_chunk(device: torch.device) -> int:
    """Tokens of a chunk: few on a CPU, where work counts; more on an accelerator, where launches do."""
    return 32 if launches.bind(device) else 16


def decay_scan(
    u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, *, chunk: int | None = None, nested: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Solves `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]` for all t at once, chunk by chunk.

    Args:
        u: inputs, (B, T, G, E): G timescales with E channels each.
        gaps: (B, T), >= 0.
        rates: one a timescale, in 1 / time units, (G,), > 0.
        state: s before the first token, (B, G, E).
        chunk: tokens solved by one matrix product; None: `scan_chunk` of the device.
        nested: what passes from chunk to chunk, the same recurrence over n / C chunks, is solved in the same way and
            not by a loop, which launches least; None: on an accelerator.

    Returns:
        s at every token, (B, T, G, E), and after the last one, (B, G, E).

    Source: ours (the paper leaves the passing of state between tokens open).
    """
    n_batch, n_tokens, n_timescales, width = u.shape
    if n_tokens == 0:
        return u, state
    exact = torch.promote_types(u.dtype, torch.float32)  # a decay close to 1 does not survive in 16 bits
    rates, gaps = rates.to(exact), gaps.to(exact).clamp(max=_NEVER)
    if n_tokens == 1:  # a step of decoding: the definition itself
        state = (torch.exp(-rates * gaps)[..., None] * state).to(u.dtype) + u[:, 0]
        return state[:, None], state
    size = min(chunk or scan_chunk(u.device), n_tokens)
    nested = launches.bind(u.device) if nested is None else nested
    padding = -n_tokens % size
    # A padded token has gap 0 and input 0, which leaves the state as it is.
    u = nn.functional.pad(u, (0, 0, 0, 0, 0, padding))
    gaps = nn.functional.pad(gaps, (0, padding))
    n_chunks = u.shape[1] // size
    u = u.view(n_batch, n_chunks, size, n_timescales, width).transpose(2, 3)  # (B, n, G, C, E)
    gaps = gaps.view(n_batch, n_chunks, 1, size)
    kernel = torch.exp(-rates[:, None, None] * elapsed_within(gaps)).to(u.dtype)  # (B, n, G, C, C)
    fading = torch.exp(-rates[:, None] * gaps.cumsum(dim=-1)).to(u.dtype)  # (B, n, G, C): of what was before the chunk
    within = kernel @ u  # (B, n, G, C, E)
    if nested:
        chunks, passed = within[..., -1, :], gaps[:, :, 0].sum(dim=-1)
        ends, end = decay_scan(chunks, passed, rates, state, chunk=_LONG_CHUNK, nested=True)
        before, state = torch.cat([state[:, None], ends[:, :-1]], dim=1), end
    else:
        starts = []
        # Unbound at once: the gradient of a slice is as large as what it was cut from, that of n slices n times so.
        for fades, added in zip(fading[..., -1, None].unbind(1), within[..., -1, :].unbind(1), strict=True):
            starts.append(state)
            state = fades * state + added
        before = torch.stack(starts, dim=1)
    s = within + fading[..., None] * before[:, :, :, None]
    return s.transpose(2, 3).reshape(n_batch, -1, n_timescales, width)[:, :n_tokens], state


@dataclass(frozen=True, kw_only=True)
class WorkingMemoryConfig:
    """Sizes of the working memory. All ours: the paper leaves h(0), K and dt open.

    Attributes:
        d_state: width of the state.
        n_timescales: number of decay rates; each owns d_state / n_timescales channels.
        longest: longest initial time constant, in time units; the shortest is 1. The rates are learned.
        refine_steps: K, steps of Eq. 2 a token, from h(0) = the normalised state.
        refine_dt: dt of Eq. 2.
    """

    d_state: int = 64
    n_timescales: int = 8
    longest: float = 1000.0
    refine_steps: int = 1
    refine_dt: float = 0.5

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.n_timescales < 1 or self.d_state % self.n_timescales:
            raise ValueError(
                f"working.d_state = {self.d_state} is no multiple of working.n_timescales = {self.n_timescales}; "
                "change one of them"
            )
        if not 1 <= self.longest <= 1e9:
            raise ValueError(f"working.longest = {self.longest} must lie between 1 and 1e9 time units")
        if self.refine_steps < 0:
            raise ValueError(f"working.refine_steps = {self.refine_steps} must be 0 or more")


class WorkingMemory(nn.Module):
    """A bank of leaky integrators, refined by Eq. 2. State: (B, n_timescales, d_state / n_timescales).

    Source: paper sec. 4, Eq. 2. Differs: h(0) is the normalised state of the integrators, which carry information
    from token to token; the paper does not say what does.
    """

    def __init__(self, config: WorkingMemoryConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        rates = torch.logspace(0.0, -math.log10(config.longest), config.n_timescales)
        self.log_rate = nn.Parameter(rates.log())
        self.write = nn.Linear(d_model, config.d_state, bias=False)
        self.norm = nn.LayerNorm(config.d_state, bias=False)
        self.w_tau = nn.Linear(1, config.d_state)
        self.w1 = nn.Linear(config.d_state, config.d_state, bias=False)
        self.w2 = nn.Linear(d_model, config.d_state)
        self.w_out = nn.Linear(config.d_state, d_model, bias=False)

    def initial_state(self, n_batch: int) -> Tensor:
        """Nothing remembered: zeros, (B, G, E)."""
        width = self.config.d_state // self.config.n_timescales
        return self.log_rate.new_zeros(n_batch, self.config.n_timescales, width)

    def forward(self, x: Tensor, gaps: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Answers every token from the recurrence.

        Args:
            x: (B, T, D); zero on padding, which then leaves the state untouched.
            gaps: time since the previous token, (B, T); zero on padding.
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


class NoWorkingMemory(nn.Module):
    """An ablation: answers with the token itself and remembers nothing. State: (B, 0)."""

    def initial_state(self, n_batch: int) -> Tensor:
        """Empty, (B, 0)."""
        return torch.zeros(n_batch, 0)

    def forward(self, x: Tensor, gaps: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """As `WorkingMemory.forward`; h(K) is one zero a token."""
        return x, torch.zeros_like(x[..., :1]), state
