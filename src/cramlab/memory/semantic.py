"""Semantic memory: parameters that learn to answer without reading (Eq. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapter.

    Attributes:
        rank: width of the bottleneck; None: d_model / 16, the paper's.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"semantic.rank = {self.rank} must be at least 1, or None for d_model / 16")

    def build(self, d_model: int) -> Adapter:
        """A fresh adapter."""
        return Adapter(self, d_model)


class Adapter(nn.Module):
    """`f_sem(x) = W_up ReLU(W_down x)`. Source: paper sec. 4, Eq. 4."""

    n_familiarity_features = 0

    def __init__(self, config: AdapterConfig, d_model: int) -> None:
        super().__init__()
        rank = config.rank if config.rank is not None else max(1, d_model // 16)
        self.w_down = nn.Linear(d_model, rank)
        self.w_up = nn.Linear(rank, d_model)

    def forward(self, h: Tensor) -> Tensor:
        """Answers h (..., D); same shape."""
        return self.w_up(F.relu(self.w_down(h)))

    def familiarity(self, h: Tensor) -> Tensor:
        """An adapter cannot tell what it knows: no features, (..., 0)."""
        return h.new_zeros(*h.shape[:-1], 0)


@dataclass(frozen=True, kw_only=True)
class SlotsConfig:
    """Key-value slots.

    Attributes:
        n_slots: slots; should exceed the number of patterns to be learned.
        d_match: dimensions in which keys are compared.
        log_scale: initial log of the learned inverse temperature of the match.
        sharpness: fixed inverse temperature at which the entropy of the match is taken.
    """

    n_slots: int = 256
    d_match: int = 32
    log_scale: float = 2.3
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        for name in ("n_slots", "d_match"):
            if getattr(self, name) < 1:
                raise ValueError(f"semantic.{name} = {getattr(self, name)} must be at least 1")

    def build(self, d_model: int) -> Slots:
        """Fresh slots."""
        return Slots(self, d_model)


class Slots(nn.Module):
    """Learned keys and values; the answer is a softmax over cosine matches.

    Source: ours. Rank d/16 cannot hold a hundred arbitrary facts at small d.
    """

    n_familiarity_features = 3

    def __init__(self, config: SlotsConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.w_query = nn.Linear(d_model, config.d_match, bias=False)
        self.keys = nn.Parameter(torch.randn(config.n_slots, config.d_match))
        self.values = nn.Parameter(torch.randn(config.n_slots, d_model) * 0.02)
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.log_scale = nn.Parameter(torch.tensor(config.log_scale))

    def forward(self, h: Tensor) -> Tensor:
        """Answers h (..., D); same shape."""
        return torch.softmax(self.log_scale.exp() * self._cosine(h), dim=-1) @ self.values + self.bias

    def familiarity(self, h: Tensor) -> Tensor:
        """How well the slots know h (..., D): (..., 3).

        Best cosine c; log(1.001 - c), for two looks at one noisy key differ by less than a hundredth in c, and the
        nearest strangers by a tenth; entropy of the match over its maximum.
        """
        cosine = self._cosine(h)
        best = cosine.amax(dim=-1)
        log_p = torch.log_softmax(self.config.sharpness * cosine, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1) / math.log(max(self.config.n_slots, 2))
        return torch.stack([best, torch.log(1.001 - best.clamp(max=1.0)), entropy], dim=-1)

    def _cosine(self, h: Tensor) -> Tensor:
        """(..., n_slots)."""
        return F.normalize(self.w_query(h), dim=-1) @ F.normalize(self.keys, dim=-1).T


@dataclass(frozen=True, kw_only=True)
class NothingConfig:
    """No semantic memory, for the control that has the price of reads alone."""

    def build(self, d_model: int) -> Nothing:  # noqa: ARG002 - as its siblings
        """A memory that answers zero; `d_model` does not matter."""
        return Nothing()


class Nothing(nn.Module):
    """Always answers zero. Source: ours, a control."""

    n_familiarity_features = 0

    def forward(self, h: Tensor) -> Tensor:
        """Zeros like h (..., D)."""
        return torch.zeros_like(h)

    def familiarity(self, h: Tensor) -> Tensor:
        """No features, (..., 0)."""
        return h.new_zeros(*h.shape[:-1], 0)


SemanticConfig = AdapterConfig | SlotsConfig | NothingConfig
SemanticMemory = Adapter | Slots
