"""Semantic memory: parameters that learn to answer without reading (Eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.config import Positive, Size, checked


@checked("model.mixer.semantic")
class AdapterConfig:
    """Low-rank adapter.

    Attributes:
        rank: width of the bottleneck; None: d_model / 16, the paper's. 256 (ours): the paper's rank, 8 at
            d_model = 128, cannot hold a hundred arbitrary facts.
    """

    rank: Size | None = 256

    def build(self, d_model: int) -> Adapter:
        """A fresh adapter."""
        return Adapter(self, d_model)


class Adapter(nn.Module):
    """`f_sem(h) = W_up ReLU(W_down h)`, in two halves, as a gate looks at the middle. Source: paper sec. 4, Eq. 4."""

    def __init__(self, config: AdapterConfig, d_model: int) -> None:
        super().__init__()
        self.rank = config.rank if config.rank is not None else max(1, d_model // 16)
        self.w_down = nn.Linear(d_model, self.rank)
        self.w_up = nn.Linear(self.rank, d_model)

    def recognise(self, h: Tensor) -> Tensor:
        """What h (..., D) brings to mind: ReLU(W_down h), (..., rank)."""
        return F.relu(self.w_down(h))

    def answer(self, recognised: Tensor) -> Tensor:
        """The answer to that, (..., D)."""
        return self.w_up(recognised)

    def forward(self, h: Tensor) -> Tensor:
        """Answers h (..., D); same shape."""
        return self.answer(self.recognise(h))

    def product_flops(self, d_model: int, first: int, full: int) -> float:
        """FLOPs of a token's matrix products, those that take h times `first`, the others times `full`."""
        return float((first + full) * 2 * d_model * self.rank)


@checked("model.mixer.semantic")
class SlotsConfig:
    """Learned key-value slots.

    Attributes:
        n_slots: slots; should exceed the number of patterns to be learned.
        d_match: dimensions in which keys are compared.
        sharpness: initial inverse temperature of the match; learned. 20: two looks at one noisy key differ by less than
            a hundredth in their cosine, the nearest strangers by a tenth.
    """

    n_slots: Size = 256
    d_match: Size = 32
    sharpness: Positive = 20.0

    def build(self, d_model: int) -> Slots:
        """Fresh slots."""
        return Slots(self, d_model)


class Slots(nn.Module):
    """Learned keys and values; the answer is a softmax over cosine matches. Source: ours.

    The bias of the query takes out what all tokens have in common, without which every slot would match every token;
    values begin as large as answers are and share a learned size, or Adam needs thousands of steps to grow them and no
    slot is worth finding until then.
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
        """How well h (..., D) matches each slot: cosines, (..., n_slots). The greatest is the match score."""
        return F.normalize(self.w_query(h), dim=-1) @ F.normalize(self.keys, dim=-1).T

    def answer(self, recognised: Tensor) -> Tensor:
        """The answer to that, (..., D)."""
        weights = torch.softmax(self.log_sharpness.exp() * recognised, dim=-1)
        return self.log_size.exp() * (weights @ self.values) + self.bias

    def forward(self, h: Tensor) -> Tensor:
        """Answers h (..., D); same shape."""
        return self.answer(self.recognise(h))

    def product_flops(self, d_model: int, first: int, full: int) -> float:
        """As `Adapter.product_flops`."""
        n_slots, d_match = self.keys.shape
        return float(2 * d_match * (first * d_model + full * n_slots) + full * 2 * n_slots * d_model)


@checked("model.mixer.semantic")
class NothingConfig:
    """No semantic memory, for the control that has the price of reads alone."""

    def build(self, d_model: int) -> Nothing:
        """A memory that answers zero."""
        return Nothing(d_model)


class Nothing(nn.Module):
    """Recognises nothing and answers zero. Source: ours, a control."""

    rank = 0

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def recognise(self, h: Tensor) -> Tensor:
        """(..., 0)."""
        return h.new_zeros(*h.shape[:-1], 0)

    def answer(self, recognised: Tensor) -> Tensor:
        """Zeros, (..., D)."""
        return recognised.new_zeros(*recognised.shape[:-1], self.d_model)

    def forward(self, h: Tensor) -> Tensor:
        """Zeros like h (..., D)."""
        return self.answer(self.recognise(h))

    def product_flops(self, d_model: int, first: int, full: int) -> float:  # noqa: ARG002
        """As `Adapter.product_flops`: nothing is multiplied."""
        return 0.0


SemanticConfig = AdapterConfig | SlotsConfig | NothingConfig
