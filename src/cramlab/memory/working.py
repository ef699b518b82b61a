"""Working memory: leaky integrators over irregular gaps, then a few refinement steps per token (Eq. 2)."""

from __future__ import annotations

import math
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cramlab.config import ConfigError, Positive, Size, checked
from cramlab.ops.scan import fused as fused_scan

_NEVER = 1e30  # a time after which nothing is left; finite, as an infinity times a zero gradient would be NaN
_CHUNK = 32  # tokens of a chunk


def decay_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, *, chunk: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """Solves `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]` for all t.

    Chunks are solved side by side, each from nothing; the ends of the chunks make a sequence that is `chunk` times
    shorter and obeys the same law, so it is solved in the same way; its answers, faded, are added to the chunks.
    Nothing is ever divided by a decay; work and memory are O(T G E). On an accelerator the kernels of `fused_scan` do
    the same, in chunks of their own.

    Args:
        u: inputs, (B, T, G, E): G timescales with E channels each.
        gaps: (B, T), >= 0.
        rates: one a timescale, in 1 / time units, (G,), > 0.
        state: s before the first token, (B, G, E).
        chunk: tokens of a chunk, at least 2.

    Returns:
        s at every token, (B, T, G, E), in the type of u; and after the last one, (B, G, E), in 32 bits at least.

    Source: ours (the paper leaves the passing of state between tokens open).
    """
    if u.shape[1] == 0:
        return u, state
    kind = u.dtype
    # A decay close to 1 does not survive in 16 bits, nor does a state that is rounded at every token.
    exact = torch.promote_types(kind, torch.float32)
    gaps, rates, state = (t.to(exact) for t in (gaps, rates, state))
    if u.shape[1] == 1:  # a step of decoding: the definition itself
        s = (torch.exp(-rates * gaps.clamp(max=_NEVER))[..., None] * state + u[:, 0].to(exact))[:, None]
    elif fused_scan.usable(u):
        s = fused_scan.decay_scan(u, gaps, rates, state)
    else:
        s = cast("Tensor", _DecayScan.apply(u.to(exact), gaps, rates, state, max(2, chunk)))
    return s.to(kind), s[:, -1]


class _DecayScan(torch.autograd.Function):
    """The scan; its gradient is the same scan from the last token to the first."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, chunk: int) -> Tensor:
        gaps = gaps.clamp(max=_NEVER)
        s = _solve(u.flatten(2), gaps, rates, state.flatten(1), chunk).view_as(u)
        ctx.save_for_backward(gaps, rates, state, s)
        ctx.chunk = chunk
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        gaps, rates, state, s = ctx.saved_tensors
        # What a token's state is worth: its own gradient, and what is left of it at the next token.
        back = torch.cat([gaps.new_zeros(len(gaps), 1), gaps[:, 1:].flip(1)], dim=1)
        nothing = torch.zeros_like(state).flatten(1)
        worth = _solve(grad.flip(1).flatten(2), back, rates, nothing, ctx.chunk).view_as(s).flip(1)
        decay = torch.exp(-rates * gaps[..., None])  # (B, T, G)
        first = decay[:, 0, :, None] * worth[:, 0]
        of_decay = (worth * torch.cat([state[:, None], s[:, :-1]], dim=1)).sum(dim=-1) * decay
        of_gaps = -(of_decay * rates).sum(dim=-1) if ctx.needs_input_grad[1] else None
        return worth, of_gaps, -(of_decay * gaps[..., None]).sum(dim=(0, 1)), first, None


def _solve(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor, chunk: int) -> Tensor:
    """S at every token, (B, T, G E), from u (B, T, G E), gaps (B, T), rates (G,) and state (B, G E)."""
    n_batch, n_tokens, width = u.shape
    if n_tokens <= chunk:
        return _by_steps(u, gaps, rates, state)
    padding = -n_tokens % chunk
    if padding:  # a padded token has gap 0 and input 0, which leaves the state as it is
        u, gaps = F.pad(u, (0, 0, 0, padding)), F.pad(gaps, (0, padding))
    u, gaps = u.unflatten(1, (-1, chunk)), gaps.unflatten(1, (-1, chunk))  # (B, n, C, G E), (B, n, C)
    s = _by_steps(u, gaps, rates, None)
    since = gaps.cumsum(dim=-1)  # since the chunk began; summed from there, so that small gaps survive after a huge one
    ends = _solve(s[:, :, -1], since[..., -1].clamp(max=_NEVER), rates, state, chunk)
    before = torch.cat([state[:, None], ends[:, :-1]], dim=1)
    s.addcmul_(_decays(since, rates, width), before[:, :, None])
    return s.view(n_batch, -1, width)[:, :n_tokens]


def _by_steps(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor | None) -> Tensor:
    """The definition, token by token along u (..., C, G E) and gaps (..., C); state None: nothing before the first."""
    s, decay = torch.empty_like(u), _decays(gaps, rates, u.shape[-1])
    for added, fades, found in zip(u.unbind(-2), decay.unbind(-2), s.unbind(-2), strict=True):
        if state is None:
            state = found.copy_(added)
        elif torch.compiler.is_compiling():  # which knows no `out` whose rows stand apart
            state = found.copy_(torch.addcmul(added, fades, state))
        else:
            state = torch.addcmul(added, fades, state, out=found)
    return s


def _decays(gaps: Tensor, rates: Tensor, width: int) -> Tensor:
    """`exp(-rate * gap)`, each rate repeated for its channels, (..., width) for gaps (...)."""
    decays = torch.exp(-rates * gaps[..., None])[..., None]
    return decays.expand(*decays.shape[:-1], width // len(rates)).flatten(-2)


@checked("model.mixer.working")
class WorkingMemoryConfig:
    """Sizes of the working memory. All ours: the paper leaves h(0), K and dt open.

    Attributes:
        d_state: width of the state.
        n_timescales: number of decay rates; each owns d_state / n_timescales channels.
        longest: longest initial time constant, in time units; the shortest is 1. The rates are learned.
        refine_steps: K, steps of Eq. 2 a token, from h(0) = the normalised state.
        refine_dt: dt of Eq. 2.
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
                f"model.mixer.working.d_state = {self.d_state} is no multiple of "
                f"model.mixer.working.n_timescales = {self.n_timescales}; change one of them"
            )


class WorkingMemory(nn.Module):
    """A bank of leaky integrators, refined by Eq. 2. State: (B, n_timescales, d_state / n_timescales).

    Source: paper sec. 4, Eq. 2. Differs: h(0) is the normalised state of the integrators, which carry information
    from token to token; the paper does not say what does.
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
        """Sets the rates, its only parameters of its own, to what they are in a new memory."""
        self.log_rate.copy_(self._initial_rates().log())

    def initial_state(self, n_batch: int, like: Tensor | None = None) -> Tensor:
        """Nothing remembered: zeros, (B, G, E), in 32 bits at least, where `like` is; None: where parameters are."""
        width = self.config.d_state // self.config.n_timescales
        exact = torch.promote_types(self.log_rate.dtype, torch.float32)
        like = self.log_rate if like is None else like
        return like.new_zeros(n_batch, self.config.n_timescales, width, dtype=exact)

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

    def initial_state(self, n_batch: int, like: Tensor | None = None) -> Tensor:
        """Empty, (B, 0)."""
        return torch.zeros(n_batch, 0, device=None if like is None else like.device)

    def forward(self, x: Tensor, gaps: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """As `WorkingMemory.forward`; h(K) is one zero a token."""
        return x, torch.zeros_like(x[..., :1]), state
