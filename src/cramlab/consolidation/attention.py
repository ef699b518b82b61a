"""The learned rule of a consolidated layer: a gate decides before anything is read, an adapter answers instead.

`install`, `remove` and `closed` put it into a model and take it off; they are those of `cramlab.consolidation.install`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.consolidation.install import closed, consolidatable_sites, install, installed, patched, remove
from cramlab.consolidation.patch import Counts, Decision, FarReads, Seen
from cramlab.hf.attention_sites import AttentionSite

__all__ = [
    "ConsolidatedAttention",
    "Counts",
    "FarReads",
    "closed",
    "consolidatable_sites",
    "install",
    "installed",
    "patched",
    "remove",
]


class Affine(nn.Module):
    """`x @ weight.T + bias`. It is no `nn.Linear`, so tools that adapt all linear maps of a model leave it alone.

    Args:
        d_in: width of x.
        d_out: width of the result.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """From (..., d_in) to (..., d_out), in the precision of x."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ConsolidatedAttention(FarReads):
    """The semantic memory and the gate of one layer. Source: ours.

    Both look at the same features of a token: what attention sees, what the window said, and how well the window's keys
    and the first keys matched (log masses by head). None needs a read. A map down to a few numbers, some of them linear
    and some behind a GELU, and a map up make the adapter; the gate sees the features and the latter numbers.

    Args:
        d_model: width of the layer's answer and of what it sees.
        d_heads: width of all heads' outputs.
        n_heads: query heads.
        rank: linear numbers of the adapter.
        units: width of the GELU layer that adapter and gate share. With rank = units = 0 the adapter is a learned
            constant.
        window: keys that every token sees, itself included.
        n_sinks: first keys that every token sees.

    Raises:
        ValueError: when a size is too small.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, *, d_model: int, d_heads: int, n_heads: int, rank: int, window: int, n_sinks: int, units: int = 0
    ) -> None:
        super().__init__(window=window, n_sinks=n_sinks)
        for name, value in (("rank", rank), ("units", units)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"consolidated.{name} = {value} must be a whole number, at least 0")
        self.rank, self.units = rank, units
        n_features, n_code = self.n_features(d_model, d_heads, n_heads), rank + units
        self.down = Affine(n_features, n_code) if n_code else None
        self.up = Affine(n_code, d_model) if n_code else None
        self.constant = None if n_code else nn.Parameter(torch.zeros(d_model))
        self.gate = Affine(n_features + units, 1)
        self.register_buffer("shift", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.threshold = 0.0
        self._rule: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def n_features(d_model: int, d_heads: int, n_heads: int) -> int:
        """Width of what adapter and gate look at."""
        return d_model + d_heads + 2 * n_heads

    @classmethod
    def beside(cls, site: AttentionSite, *, rank: int, window: int, n_sinks: int, units: int = 0) -> Self:
        """One that fits a site, in its dtype and on its device."""
        layer = cls(d_model=site.d_model, d_heads=site.d_heads, n_heads=site.n_heads, rank=rank, units=units,
                    window=window, n_sinks=n_sinks)  # fmt: skip
        return layer.to(device=site.device, dtype=site.dtype)

    def at(self, threshold: float) -> Self:
        """The same weights with another threshold, and counts of its own; this layer stays as it is."""
        other = copy.copy(self)
        other.threshold, other._rule, other.handles, other.tally = threshold, None, [], type(self.tally)()
        return other

    def inner(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What gate and adapter are made of: standardised features (..., F) and code (..., rank + units).

        In at least 32 bits: in 16, rounding alone would decide for tokens near the threshold.
        """
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        x = (features - self.shift) * self.scale
        if self.down is None:
            return x, x[..., :0]
        code = self.down(x)
        if self.units:
            code = torch.cat([code[..., : self.rank], F.gelu(code[..., self.rank :])], dim=-1)
        return x, code

    def score(self, x: Tensor, code: Tensor) -> Tensor:
        """The gate's score, (...,), from `inner`: the higher, the more a read is worth."""
        return self.gate(torch.cat([x, code[..., self.rank :]], dim=-1) if self.units else x).squeeze(-1)

    def answer(self, code: Tensor) -> Tensor:
        """The adapter's answer, (..., d_model), from `inner`: what the far read would have added to the layer's."""
        if self.up is None:
            assert self.constant is not None
            return self.constant.expand(*code.shape[:-1], -1)
        return self.up(code)

    def scores(self, features: Tensor) -> Tensor:
        """`score` from features (..., F)."""
        return self.score(*self.inner(features))

    def adapt(self, features: Tensor) -> Tensor:
        """`answer` from features (..., F)."""
        return self.answer(self.inner(features)[1])

    def decide(self, seen: Seen) -> Decision:
        """Tokens whose score is above the threshold read, the adapter answers for the others."""
        x, code = self.inner(seen.features)
        score = self.score(x, code)
        reads = score > self.threshold if self._rule is None else self._rule(score)
        return reads, None if bool((reads | ~seen.far).all()) else self.answer(code)

    @property
    def never_reads(self) -> bool:  # type: ignore[override]
        """Whether the threshold is above every score."""
        return self._rule is None and self.threshold == float("inf")

    @property
    def rule(self) -> Callable[[Tensor], Tensor] | None:
        """Deprecated: what decides in place of the threshold, from scores (B, T) to reads, bool (B, T)."""
        return self._rule

    @rule.setter
    def rule(self, rule: Callable[[Tensor], Tensor] | None) -> None:
        warnings.warn(
            "rule is deprecated and goes with the next release; install a subclass of FarReads with another decide(), "
            "or layer.at(threshold)", DeprecationWarning, stacklevel=2,
        )  # fmt: skip
        self._rule = rule
