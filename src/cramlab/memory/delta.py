"""Working memory as a gated delta rule: keys and values in a matrix that is corrected and fades over time gaps."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Size, checked
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
        inputs, after = self._convolve(self.w_in(x), before, valid)
        q, k, v = (part.unflatten(-1, heads) for part in F.silu(inputs).chunk(3, dim=-1))
        beta = torch.sigmoid(self.w_beta(x))
        rate = self.log_rate.exp() * F.softplus(self.w_rate(x).float() + self.rate_bias)
        log_decay = -rate * gaps[..., None].to(rate.dtype)
        if valid is not None:
            beta, log_decay = (t.masked_fill(~valid[..., None], 0) for t in (beta, log_decay))
        answers, matrices = delta_rule(
            F.normalize(q.float(), dim=-1) / math.sqrt(heads[1]),
            F.normalize(k.float(), dim=-1),
            v,
            beta,
            log_decay,
            matrices.unflatten(1, (*heads, heads[1])),
        )
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

    def _convolve(self, inputs: Tensor, before: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """A causal convolution over the tokens that are not padding, each channel by itself.

        Args:
            inputs: (B, T, C).
            before: the last inputs of earlier calls, (B, (conv_tokens - 1) * C).
            valid: see `forward`.

        Returns:
            (B, T, C), anything on padding; and the last inputs for the next call.
        """
        n_before = self.config.conv_tokens - 1
        if not n_before:
            return inputs * self.conv[:, 0].to(inputs.dtype), before
        n_tokens, width = inputs.shape[1:]
        order = None
        if valid is not None:  # tokens move to the front of their row, so that padding never stands between them
            order = (~valid).to(torch.int8).argsort(dim=1, stable=True)[..., None].expand(-1, -1, width)
            inputs = inputs.gather(1, order)
        history = torch.cat([before.unflatten(1, (n_before, width)).to(inputs.dtype), inputs], dim=1)
        # Shifted products fuse into one pass; a depthwise convolution of cuDNN takes several times as long.
        first, *taps = self.conv.to(inputs.dtype).unbind(1)
        found = first * history[:, :n_tokens]
        for i, tap in enumerate(taps, start=1):
            found = found + tap * history[:, i : i + n_tokens]
        if valid is None:
            last = history[:, n_tokens:]
        else:
            place = valid.sum(dim=1)[:, None] + torch.arange(n_before, device=inputs.device)
            last = history.gather(1, place[..., None].expand(-1, -1, width))
        if order is not None:
            found = torch.empty_like(found).scatter(1, order, found)
        return found, last.to(before.dtype).flatten(1)
