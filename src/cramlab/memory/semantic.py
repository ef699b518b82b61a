"""Semantic memory: parameters that learn to answer without reading (Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapter.

    Attributes:
        rank: width of the bottleneck; None: d_model / 16, the paper's. 256 (ours): the paper's rank, 8 at
            d_model = 128, cannot hold a hundred arbitrary facts.
    """

    rank: int | None = 256

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"semantic.rank = {self.rank} must be at least 1, or None for d_model / 16")

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


@dataclass(frozen=True, kw_only=True)
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


SemanticConfig = AdapterConfig | NothingConfig
