"""Routers decide which memory a token uses.

`gumbel` is the paper's router (Eq. 7) and must read before it decides. `benefit` is ours and decides from the token's
own state. `always`, `never`, `random` and `oracle` are controls.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Positive, Share, Size, checked
from cramlab.mixer import Path, Routing
from cramlab.ops.plain import is_plain
from cramlab.ranks import draw_rows

RouterName = Literal["benefit", "gumbel", "always", "never", "oracle", "random"]
GateTarget = Literal["decision", "nats", "soft", "straight"]


@checked("model.mixer.router")
class RouterConfig:
    """The router and its sizes.

    Attributes:
        name: "benefit" (ours), "gumbel" (paper), or one of the controls "always", "never", "oracle" and "random".
        d_hidden: hidden width of the benefit gate or of the paper's g.
        learns: what the benefit gate learns. "decision": whether a read pays at the price of the objective. "nats": how
            many nats a read saves; a token reads if that exceeds a threshold, which can move after training. "soft":
            weight of the read in the output, learned by the task's loss (LoGo, arXiv 2608.29539). "straight": the same
            weight, rounded to 0 or 1, with the gradient of the weight.
        random_frac: share of tokens that the random router lets read, 0 to 1.
        sigma: tolerance of Eq. 6, relative to the norm of what was retrieved.
    """

    name: RouterName = "benefit"
    learns: GateTarget = "decision"
    d_hidden: Size = 64
    random_frac: Share = 0.05
    sigma: Positive = 1.0


class BenefitGate(nn.Module):
    """Predicts from a token's own state whether a read is worth its price.

    Its inputs are h and the hidden activations of the semantic memory for h. Trained by `objective.terms` on
    counterfactual benefit, it sees them detached and does not shape them. Source: ours.

    Attributes:
        threshold: what is subtracted from the output, scalar in 32 bits; None: nothing, as the price is learned.
    """

    # With Adam, a fixed gain on the output acts like a higher learning rate for the gate.
    gain = 4.0
    threshold: Tensor | None

    def __init__(self, config: RouterConfig, d_model: int, rank: int) -> None:
        super().__init__()
        self.learns = config.learns
        self.hidden = nn.Linear(d_model + rank, config.d_hidden)
        self.out = nn.Linear(config.d_hidden, 1)
        self.register_buffer("threshold", None if config.learns == "decision" else torch.zeros(()))

    def forward(self, h: Tensor, recognised: Tensor) -> Tensor:
        """Margin of reading, (B, T), above 0 for tokens that read, from h (B, T, D) and `recognise(h)` (B, T, rank)."""
        if self.learns in ("decision", "nats"):
            h, recognised = h.detach(), recognised.detach()
        if is_plain(self.hidden, nn.Linear):  # splitting the weight avoids a copy of the inputs
            of_h, of_recognised = self.hidden.weight.split([h.shape[-1], recognised.shape[-1]], dim=1)
            z = F.linear(h, of_h, self.hidden.bias) + F.linear(recognised, of_recognised)
        else:
            z = self.hidden(torch.cat([h, recognised], dim=-1))
        found = self.out(F.silu(z)).squeeze(-1)
        if self.threshold is None:
            return self.gain * found
        return (found if self.learns == "nats" else self.gain * found).float() - self.threshold

    def weight(self, margin: Tensor, reads: Tensor) -> Tensor | None:
        """Weight of each read in the output, (B, T), for margins and tokens that read; None: 1."""
        if self.threshold is None or self.learns == "nats":
            return None
        soft = torch.sigmoid(margin + self.threshold)
        return reads * soft if self.learns == "soft" else reads + soft - soft.detach()


class GumbelRouter(nn.Module):
    """`pi = softmax(g(z))` over working, episodic and semantic memory, z = [gap, state size, q, uncertainty] (Eq. 7).

    q is known only after a read, so every token is scored. Differs: the paper does not define "prediction uncertainty";
    ours is a learned scalar of the token.
    """

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__()
        self.uncertainty = nn.Linear(d_model, 1)
        self.hidden = nn.Linear(4, config.d_hidden)
        self.out = nn.Linear(config.d_hidden, len(Path))

    def forward(self, x: Tensor, gaps: Tensor, hidden: Tensor, quality: Tensor) -> Tensor:
        """Logits of the three paths, (B, T, 3), from x (B, T, D), gaps (B, T), h(K) of working memory, and q (B, T)."""
        size = hidden.square().mean(dim=-1).sqrt()
        uncertainty = F.softplus(self.uncertainty(x)).squeeze(-1)
        z = torch.stack([torch.log1p(gaps), size, quality, uncertainty], dim=-1)
        return self.out(F.silu(self.hidden(z)))


def gumbel_weights(logits: Tensor, routing: Routing) -> Tensor:
    """Path weights (B, T, 3): a Gumbel-softmax sample, or the one-hot argmax if `routing.temperature` is None."""
    if routing.temperature is None:
        return F.one_hot(logits.argmax(dim=-1), len(Path)).to(logits.dtype)
    exponential = draw_rows(
        lambda shape: logits.new_empty(shape).exponential_(generator=routing.generator), logits.shape
    )
    noise = -exponential.clamp(min=torch.finfo(logits.dtype).tiny).log()
    return torch.softmax((logits + noise) / routing.temperature, dim=-1)


def chance(shape: torch.Size | tuple[int, ...], share: float, routing: Routing, device: torch.device) -> Tensor:
    """Independent draws, true with probability `share`, bool of the given shape."""
    return draw_rows(lambda rows: torch.rand(rows, generator=routing.generator, device=device), shape) < share
