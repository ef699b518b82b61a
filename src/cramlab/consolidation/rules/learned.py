"""The learned rule: a gate decides before any far read, and an adapter predicts the skipped reads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen, check_size
from cramlab.hf.attention_sites import AttentionSite


class Affine(nn.Module):
    """The map `x @ weight.T + bias`. It is not an `nn.Linear`, so tools that adapt all linear maps leave it alone.

    Args:
        d_in: width of x.
        d_out: width of the result.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., d_in) to (..., d_out), in the precision of x."""
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ConsolidatedAttention(FarReads):
    """The gate and the adapter (the semantic memory) of one layer. Source: ours.

    Both take the same features of a token: the input of attention, the heads' outputs over the window, and the
    log-sum-exp of the scores over the window and over the first keys. None of them needs a far read. The adapter is a
    map down to `rank` linear numbers and `units` numbers behind a GELU, and a map up. The gate is an affine map of the
    features and of the numbers behind the GELU.

    Args:
        d_model: width of the layer's input and output.
        d_heads: width of the outputs of all heads side by side.
        n_heads: number of query heads.
        rank: number of linear numbers of the adapter.
        units: width of the GELU layer shared by adapter and gate. With rank = units = 0 the adapter is a learned
            constant.
        n_offsets: number of offsets that the gate's score gets for the number of keys that a token sees, see `offset`;
            0: the threshold is the same for every position.
        window: number of most recent keys that every token attends to, itself included.
        n_sinks: number of first keys that every token attends to.

    Raises:
        ValueError: when a size is too small.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, *, d_model: int, d_heads: int, n_heads: int, rank: int, window: int, n_sinks: int, units: int = 0,
        n_offsets: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(window=window, n_sinks=n_sinks)
        for name, value in (("rank", rank), ("units", units), ("n_offsets", n_offsets)):
            check_size(name, value, 0)
        self.rank, self.units, self.n_offsets = rank, units, n_offsets
        n_features, n_code = self.n_features(d_model, d_heads, n_heads), rank + units
        self.down = Affine(n_features, n_code) if n_code else None
        self.up = Affine(n_code, d_model) if n_code else None
        self.constant = None if n_code else nn.Parameter(torch.zeros(d_model))
        self.gate = Affine(n_features + units, 1)
        self.offsets = nn.Parameter(torch.zeros(n_offsets)) if n_offsets else None
        self.register_buffer("shift", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.threshold = 0.0
        self._rule: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def n_features(d_model: int, d_heads: int, n_heads: int) -> int:
        """Number of features that adapter and gate take."""
        return d_model + d_heads + 2 * n_heads

    @classmethod
    def beside(
        cls, site: AttentionSite, *, rank: int, window: int, n_sinks: int, units: int = 0, n_offsets: int = 0
    ) -> Self:
        """A layer of the sizes, the dtype and the device of a site; weights are zeros."""
        layer = cls(d_model=site.d_model, d_heads=site.d_heads, n_heads=site.n_heads, rank=rank, units=units,
                    window=window, n_sinks=n_sinks, n_offsets=n_offsets)  # fmt: skip
        return layer.to(device=site.device, dtype=site.dtype)

    def at(self, threshold: float) -> Self:
        """A layer with the same weights, another threshold and its own counts; this layer stays as it is."""
        other = copy.copy(self)
        other.threshold, other._rule, other.handles, other.tally = threshold, None, [], type(self.tally)()
        return other

    def inner(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features (..., F) and the adapter's code (..., rank + units), from features (..., F).

        They are computed in at least 32 bits: in 16, rounding alone decides for tokens near the threshold.
        """
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        x = (features - self.shift) * self.scale
        if self.down is None:
            return x, x[..., :0]
        code = self.down(x)
        if self.units:
            code = torch.cat([code[..., : self.rank], F.gelu(code[..., self.rank :])], dim=-1)
        return x, code

    def score(self, x: Tensor, code: Tensor, n_keys: Tensor) -> Tensor:
        """Score of the gate, (...,): a prediction of the log of the nats that a far read saves.

        Args:
            x: standardised features, (..., F), from `inner`.
            code: the adapter's code, (..., rank + units), from `inner`.
            n_keys: number of keys that a token sees, itself included, (...,).
        """
        score = self.gate(torch.cat([x, code[..., self.rank :]], dim=-1) if self.units else x).squeeze(-1)
        return score if self.offsets is None else score + self.offset(n_keys)

    def offset(self, n_keys: Tensor) -> Tensor:
        """What is added to the score of tokens that see `n_keys` keys, (...,); below the threshold it acts as another.

        It is linear in the logarithm of `n_keys` between offsets, which stand at 1, 2, 4, ... keys, and constant
        beyond the last.
        """
        assert self.offsets is not None
        last = len(self.offsets) - 1
        octave = n_keys.clamp(min=1).float().log2().clamp(max=last)
        knots = torch.arange(last + 1, device=octave.device)
        return (1 - (octave[..., None] - knots).abs()).clamp(min=0) @ self.offsets.float()

    def answer(self, code: Tensor) -> Tensor:
        """Output of the adapter, (..., d_model), from `inner`: a prediction of what the far read adds."""
        if self.up is None:
            assert self.constant is not None
            return self.constant.expand(*code.shape[:-1], -1)
        return self.up(code)

    def scores(self, features: Tensor, n_keys: Tensor) -> Tensor:
        """`score` from features (..., F)."""
        return self.score(*self.inner(features), n_keys)

    def adapt(self, features: Tensor) -> Tensor:
        """`answer` from features (..., F)."""
        return self.answer(self.inner(features)[1])

    def decide(self, seen: Seen) -> Decision:
        """Tokens whose score is above the threshold read; for the others, the adapter predicts the far read."""
        x, code = self.inner(seen.features)
        score = self.score(x, code, seen.n_keys)
        reads = score > self.threshold if self._rule is None else self._rule(score)
        return reads, None if bool((reads | ~seen.far).all()) else self.answer(code)

    @property
    def never_reads(self) -> bool:  # type: ignore[override]
        """Whether the threshold is above every score."""
        return self._rule is None and self.threshold == float("inf")

    @property
    def rule(self) -> Callable[[Tensor], Tensor] | None:
        """Deprecated: decides in place of the threshold, from scores (B, T) to reads, bool (B, T)."""
        return self._rule

    @rule.setter
    def rule(self, rule: Callable[[Tensor], Tensor] | None) -> None:
        warnings.warn(
            "rule is deprecated and will be removed in the next release; install a subclass of FarReads with another "
            "decide(), or layer.at(threshold)", DeprecationWarning, stacklevel=2,
        )  # fmt: skip
        self._rule = rule


def at_threshold(layers: Mapping[int, ConsolidatedAttention], threshold: float) -> dict[int, ConsolidatedAttention]:
    """The layers with one threshold for all gates: a read that saves as many nats is worth the same in every layer."""
    return {i: layer.at(threshold) for i, layer in layers.items()}


def rounded(layers: Mapping[int, ConsolidatedAttention]) -> None:
    """Rounds the weights in place to half precision, in which the folder stores them."""
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data = parameter.data.half().to(parameter.dtype)
