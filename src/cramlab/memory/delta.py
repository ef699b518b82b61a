"""Working memory as a gated delta rule: keys and values in a matrix that is corrected and fades over time gaps."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Size, checked
from cramlab.ops.conv.heads import convolved_heads
from cramlab.ops.scan.delta import delta_flops, delta_rule


@checked("model.mixer.working")
class DeltaMemoryConfig:
    """Sizes of a gated delta rule. Source: Gated DeltaNet (arXiv 2412.06464); decay over time gaps: ours.

    Attributes:
        n_heads: number of heads, each with a state of d_head x d_head numbers.
        d_head: width of keys, queries and values of a head.
        conv_tokens: tokens that the short causal convolution before keys, queries and values covers; 1: none.
    """

    n_heads: Size = 4
    d_head: Size = 64
    conv_tokens: Annotated[int, Field(ge=1, le=64)] = 4

    def build(self, d_model: int) -> DeltaMemory:
        """A newly initialised memory."""
        return DeltaMemory(self, d_model)


class DeltaMemory(nn.Module):
    """A gated delta rule with a short convolution and an output gate.

    The decay of a head after a gap is `exp(-gap * rate)`, with a rate that each token chooses. State: one row of
    numbers a sequence, (B, n_heads * d_head * d_head + (conv_tokens - 1) * 3 * n_heads * d_head): the heads' matrices,
    then the inputs of the convolution that the next token still needs, all in at least 32 bits.
    """

    def __init__(self, config: DeltaMemoryConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.d_head
        self.w_in = nn.Linear(d_model, 3 * width, bias=False)  # queries, keys, values
        self.conv = nn.Parameter(torch.empty(3 * width, config.conv_tokens))
        self.w_beta = nn.Linear(d_model, config.n_heads, bias=False)
        self.w_rate = nn.Linear(d_model, config.n_heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(config.n_heads))
        self.rate_bias = nn.Parameter(torch.empty(config.n_heads))
        self.norm = nn.Parameter(torch.empty(config.d_head))
        self.w_gate = nn.Linear(d_model, width, bias=False)
        self.w_out = nn.Linear(width, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the parameters that are its own: rates between 0.001 and 1.6 per time unit, spread at random."""
        bound = 1 / math.sqrt(self.config.conv_tokens)
        self.conv.uniform_(-bound, bound)
        self.log_rate.uniform_(1, 16).log_()
        steps = torch.exp(torch.empty_like(self.rate_bias).uniform_(math.log(0.001), math.log(0.1)))
        self.rate_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it gives the step back
        self.norm.fill_(1)

    @property
    def _sizes(self) -> tuple[int, int]:
        """How many numbers of a sequence's state belong to the matrices, and how many to the convolution."""
        heads, width = self.config.n_heads, self.config.d_head
        return heads * width * width, (self.config.conv_tokens - 1) * 3 * heads * width

    def initial_state(self, n_batch: int, like: Tensor | None = None) -> Tensor:
        """Zeros, in at least 32 bits, on the device of `like`; None: that of the parameters."""
        exact = torch.promote_types(self.log_rate.dtype, torch.float32)
        return (self.log_rate if like is None else like).new_zeros(n_batch, sum(self._sizes), dtype=exact)

    def forward(
        self, x: Tensor, gaps: Tensor, state: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Answers every token from the recurrence.

        Args:
            x: (B, T, D).
            gaps: time since the previous token, (B, T).
            state: from `initial_state` or the previous call.
            valid: false on padding, bool (B, T), which is passed over; None: no token is padding.

        Returns:
            `W_o h + x`, (B, T, D), where h are the heads' outputs; h, (B, T, n_heads * d_head); and the state after
            the last token.
        """
        heads = (self.config.n_heads, self.config.d_head)
        matrices, before = state.split(self._sizes, dim=1)
        q, k, v, after = self._convolve(self.w_in(x), before, valid)
        beta = torch.sigmoid(self.w_beta(x))
        rate = self.log_rate.exp() * F.softplus(self.w_rate(x).float() + self.rate_bias)
        log_decay = -rate * gaps[..., None].to(rate.dtype)
        if valid is not None:
            beta, log_decay = (t.masked_fill(~valid[..., None], 0) for t in (beta, log_decay))
        answers, matrices = delta_rule(q, k, v, beta, log_decay, matrices.unflatten(1, (*heads, heads[1])))
        h = F.rms_norm(answers, heads[1:], self.norm.to(answers.dtype), 1e-6).flatten(2) * F.silu(self.w_gate(x))
        return self.w_out(h) + x, h, torch.cat([matrices.flatten(1), after], dim=1)

    def product_flops(self, d_model: int, full: int, half: int) -> float:  # noqa: ARG002
        """FLOPs per token as in `WorkingMemory.product_flops`; the products inside a chunk are those of a full one."""
        heads, width = self.config.n_heads, self.config.d_head
        maps = 2 * d_model * (5 * heads * width + 2 * heads)
        convolution = 2 * self.config.conv_tokens * 3 * heads * width if self.config.conv_tokens > 1 else 0
        return float(full * (maps + convolution + heads * delta_flops(width, width)))

    @property
    def state_size(self) -> int:
        """Numbers in the state of a sequence."""
        return sum(self._sizes)

    def _convolve(self, inputs: Tensor, before: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, from a causal convolution over the tokens that are not padding.

        Args:
            inputs: (B, T, C).
            before: the last inputs of earlier calls, (B, (conv_tokens - 1) * C).
            valid: see `forward`.

        Returns:
            Queries, keys and values, (B, T, n_heads, d_head), anything on padding; the last inputs for the next call.
        """
        n_before, width = self.config.conv_tokens - 1, inputs.shape[2]
        earlier = before.unflatten(1, (n_before, width))
        order = None
        if valid is not None:  # tokens move to the front of their row, so that padding never stands between them
            order = (~valid).to(torch.int8).argsort(dim=1, stable=True)[..., None]
            inputs = inputs.gather(1, order.expand_as(inputs))
        q, k, v = convolved_heads(inputs, self.conv, earlier, self.config.n_heads)
        if not n_before:
            last = earlier
        elif valid is None:
            last = torch.cat([earlier, inputs[:, -n_before:].to(earlier.dtype)], dim=1)[:, -n_before:]
        else:
            history = torch.cat([earlier, inputs.to(earlier.dtype)], dim=1)
            place = valid.sum(dim=1)[:, None] + torch.arange(n_before, device=inputs.device)
            last = history.gather(1, place[..., None].expand(-1, -1, width))
        if order is not None:
            place = order[..., None].expand_as(q)
            q, k, v = (torch.empty_like(t).scatter(1, place, t) for t in (q, k, v))
        return q, k, v, last.flatten(1)
