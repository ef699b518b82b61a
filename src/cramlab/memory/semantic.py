"""Semantic memory: parameters that learn to answer without reading (Eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Positive, Size, checked


@checked("model.mixer.semantic")
class AdapterConfig:
    """Sizes of a low-rank adapter.

    Attributes:
        rank: width of the bottleneck; None: d_model / 16 (paper). 256 is ours: the paper's rank, 8 at d_model = 128,
            cannot hold a hundred arbitrary facts.
    """

    rank: Size | None = 256

    def build(self, d_model: int) -> Adapter:
        """A newly initialised adapter."""
        return Adapter(self, d_model)


class Adapter(nn.Module):
    """`f_sem(h) = W_up ReLU(W_down h)`, in two halves, because a gate uses the hidden activations.

    Source: paper, Eq. 4.
    """

    def __init__(self, config: AdapterConfig, d_model: int) -> None:
        super().__init__()
        self.rank = config.rank if config.rank is not None else max(1, d_model // 16)
        self.w_down = nn.Linear(d_model, self.rank)
        self.w_up = nn.Linear(self.rank, d_model)

    def recognise(self, h: Tensor) -> Tensor:
        """Hidden activations ReLU(W_down h), (..., rank), for h (..., D)."""
        return F.relu(self.w_down(h))

    def answer(self, recognised: Tensor) -> Tensor:
        """Output f_sem for the hidden activations, (..., D)."""
        return self.w_up(recognised)

    def forward(self, h: Tensor) -> Tensor:
        """Output f_sem for h (..., D), (..., D)."""
        return self.answer(self.recognise(h))

    def product_flops(self, d_model: int, first: int, full: int) -> float:
        """FLOPs of the matrix products per token: products with h times `first`, all others times `full`."""
        return float((first + full) * 2 * d_model * self.rank)


@checked("model.mixer.semantic")
class SlotsConfig:
    """Sizes of learned key-value slots.

    Attributes:
        n_slots: number of slots; should exceed the number of patterns to be learned.
        d_match: number of dimensions in which keys are compared.
        sharpness: initial inverse temperature of the match, which is learned. Chosen because cosines of one noisy key
            differ by less than 0.01, and those of the nearest different keys by 0.1.
    """

    n_slots: Size = 256
    d_match: Size = 32
    sharpness: Positive = 20.0

    def build(self, d_model: int) -> Slots:
        """Newly initialised slots."""
        return Slots(self, d_model)


class Slots(nn.Module):
    """Learned keys and values; the output is a softmax over cosine matches. Source: ours.

    The bias of the query removes what all tokens have in common; without it every slot would match every token. Values
    begin at the size of outputs and share a learned size; otherwise Adam needs thousands of steps to grow them, and
    until then no slot is worth matching.
    """

    def __init__(self, config: SlotsConfig, d_model: int) -> None:
        super().__init__()
        self.rank = config.n_slots
        self.w_query = nn.Linear(d_model, config.d_match)
        self.keys = nn.Parameter(torch.randn(config.n_slots, config.d_match))
        self.values = nn.Parameter(torch.randn(config.n_slots, d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(config.sharpness)))
        self.log_size = nn.Parameter(torch.tensor(0.0))

    def recognise(self, h: Tensor) -> Tensor:
        """Cosine between the query of h (..., D) and the key of each slot, (..., n_slots)."""
        return F.normalize(self.w_query(h), dim=-1) @ F.normalize(self.keys, dim=-1).T

    def answer(self, recognised: Tensor) -> Tensor:
        """Output f_sem for the cosines with all slots, (..., D)."""
        weights = torch.softmax(self.log_sharpness.exp() * recognised, dim=-1)
        return self.log_size.exp() * (weights @ self.values) + self.bias

    def forward(self, h: Tensor) -> Tensor:
        """Output f_sem for h (..., D), (..., D)."""
        return self.answer(self.recognise(h))

    def product_flops(self, d_model: int, first: int, full: int) -> float:
        """Implements `Adapter.product_flops`."""
        n_slots, d_match = self.keys.shape
        return float(2 * d_match * (first * d_model + full * n_slots) + full * 2 * n_slots * d_model)


@checked("model.mixer.semantic")
class NothingConfig:
    """No semantic memory: the control that has only the price of reads."""

    def build(self, d_model: int) -> Nothing:
        """A memory whose output is zero."""
        return Nothing(d_model)


class Nothing(nn.Module):
    """The output is always zero. Source: ours, a control."""

    rank = 0

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def recognise(self, h: Tensor) -> Tensor:
        """An empty tensor, (..., 0)."""
        return h.new_zeros(*h.shape[:-1], 0)

    def answer(self, recognised: Tensor) -> Tensor:
        """Zeros, (..., D)."""
        return recognised.new_zeros(*recognised.shape[:-1], self.d_model)

    def forward(self, h: Tensor) -> Tensor:
        """Zeros, (..., D), for h (..., D)."""
        return self.answer(self.recognise(h))

    def product_flops(self, d_model: int, first: int, full: int) -> float:  # noqa: ARG002
        """Implements `Adapter.product_flops`. Nothing is multiplied."""
        return 0.0


SemanticConfig = AdapterConfig | SlotsConfig | NothingConfig
SemanticMemory = Adapter | Slots | Nothing
