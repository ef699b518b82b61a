"""The write gate decides which tokens are worth an entry in the episodic buffer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.ranks import count_over_ranks

_LARGEST_REGRET = 1.0


class SalienceGate(nn.Module):
    """Predicts from a token's own state whether its entry will be read.

    The use of an entry is the squared attention weight that later reads of the same call give it, mean over heads,
    summed over readers. The weight is squared because leaving out an entry of weight w moves the output by w / (1 - w)
    of its distance from that entry: the squared error grows with w squared, and weight spread thinly over many entries
    is no reason to keep them. An entry is worth its slot if its expected use exceeds a price, so the gate is trained
    as a classification weighted by regret, like the read gate. Only the label depends on the future.

    Source: ours (the paper stores "novel events" without a rule).
    """

    d_hidden = 32

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_model, self.d_hidden)
        self.out = nn.Linear(self.d_hidden, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Opens the gate, as in a new one: an untrained gate writes every token. The linear maps reset themselves."""
        nn.init.constant_(self.out.bias, 1.0)

    def forward(self, h: Tensor) -> Tensor:
        """Logit of writing, (B, T), from h (B, T, D), which gets no gradient."""
        return self.out(F.silu(self.hidden(h.detach()))).squeeze(-1)

    @staticmethod
    def loss(logit: Tensor, use: Tensor, price: float, where: Tensor, *, by_sequence: bool = False) -> Tensor:
        """Cross-entropy of "use exceeds the price", weighted by the distance between use and price. Scalar.

        Args:
            logit: of writing, (B, T).
            use: of each token's entry, (B, T).
            price: in the unit of use.
            where: tokens that were written, bool (B, T); the others do not contribute.
            by_sequence: return the sum over the tokens of each sequence, (B,), instead of the mean.
        """
        margin = use.detach() - price
        nats = F.binary_cross_entropy_with_logits(logit, (margin > 0).to(logit.dtype), reduction="none")
        regret = margin.abs().clamp(max=_LARGEST_REGRET) * where
        if by_sequence:
            return (nats * regret).sum(dim=1) / price
        return (nats * regret).sum() / (price * count_over_ranks(where.sum()))
