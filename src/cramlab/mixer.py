"""The interface between a model and its mixers: `Mixer`, `Routing`, `MixerOutput`, `Cost`."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cramlab.value_checks import checks_values


class Path(enum.IntEnum):
    """The memory that determined the output of a token."""

    WORKING = 0
    EPISODIC = 1
    SEMANTIC = 2


class Bounds(NamedTuple):
    """Most tokens of a sequence that read or are written in a call: the first ones do, later ones do not.

    Attributes:
        reads: number of tokens that read, at least 1.
        writes: number of tokens that pass a write gate, at least 1. Without a write gate every token is written.
    """

    reads: int
    writes: int


class Routing(NamedTuple):
    """What the caller asks of a router in one call. By default the router decides as in decoding.

    Attributes:
        read_all: every valid token reads (the encoding phase).
        audits: tokens that read whatever a learned gate decides, bool (B, T), so that training sees the cost of
            skipping. Other routers ignore it.
        skips: tokens that do not read, whatever the router decides and `read_all` says, bool (B, T). For a `CRAMLayer`
            whose router decides before it reads; other mixers ignore it.
        counterfactual: also return the output that the layer would have without its reads, if it can.
        temperature: sampling temperature of a router that samples; None: no sampling.
        oracle_reads: tokens that read with the oracle router, bool (B, T). Other routers ignore it.
        generator: source of all random choices of the call; None: torch's global generator.
        bounds: bounds on reads and writes, so that no size depends on a gate and a CUDA graph can record the call with
            its gradients. For a `CRAMLayer` whose router decides before it reads; other mixers ignore it. Tokens cut
            off by a bound neither read nor teach the gates, so set wide bounds in training.
        by_sequence: `MixerOutput.aux` holds the sum over the tokens of each sequence, (B,), instead of the mean over
            all tokens, so that the parts of a batch add up. For a `CRAMLayer`; other mixers have no such losses.
    """

    read_all: bool = False
    audits: Tensor | None = None
    skips: Tensor | None = None
    counterfactual: bool = False
    temperature: float | None = None
    oracle_reads: Tensor | None = None
    generator: torch.Generator | None = None
    bounds: Bounds | None = None
    by_sequence: bool = False


class Trace(NamedTuple):
    """What a mixer did with each token. All fields are (B, T).

    Attributes:
        path: `Path` that the router chose, int64; for a soft router, the path of largest weight.
        attended: the token's output uses attention over the buffer, bool.
        scored: the token was scored against the buffer for any reason, audits included, bool.
        gate_prob: probability of reading according to the router, 0 to 1.
        gate_logit: the logit of `gate_prob`; None for a router that is not trained on benefit.
        quality: match q of the semantic memory's output with what was read (Eq. 6), 0 to 1; NaN where unknown.
        written: the token was written to the buffer, bool; None: all valid tokens were.
    """

    path: Tensor
    attended: Tensor
    scored: Tensor
    gate_prob: Tensor
    gate_logit: Tensor | None = None
    quality: Tensor | None = None
    written: Tensor | None = None

    @classmethod
    def of_reads(cls, attended: Tensor, dtype: torch.dtype) -> Trace:
        """Trace of a mixer that scores only the tokens which use attention, bool (B, T); the others use recurrence."""
        return cls(
            path=torch.where(attended, int(Path.EPISODIC), int(Path.WORKING)),
            attended=attended,
            scored=attended,
            gate_prob=attended.to(dtype),
        )


class MixerOutput(NamedTuple):
    """Everything that a call returns; nothing is stored on the module.

    A named tuple, because Lightning Fabric traverses tuples but refuses frozen dataclasses.

    Attributes:
        y: output, (B, T, D).
        state: input of the next call, on the continuation of the same sequences.
        trace: what the mixer did with each token.
        aux: named scalar losses, unweighted; see `Routing.by_sequence`.
        y_without_reads: output without any read, (B, T, D); None unless `Routing.counterfactual`.
    """

    y: Tensor
    state: Any
    trace: Trace
    aux: dict[str, Tensor]
    y_without_reads: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a mixer on one sequence, by default of a forward pass. A multiplication and an addition are two FLOPs.

    Attributes:
        projection_flops: FLOPs that do not depend on the number of reads.
        read_flops: FLOPs of scoring and mixing, for the given share of tokens that read.
        state_bytes: bytes carried from token to token in decoding, at 4 bytes per number.
        reads: number of tokens scored against a buffer for any reason.
        parameter_bytes: bytes of the parameters; 0 if the mixer does not say.
        parts: `flops` by purpose; empty if the mixer does not say.
    """

    projection_flops: float
    read_flops: float
    state_bytes: int
    reads: float = 0.0
    parameter_bytes: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.projection_flops + self.read_flops


class Mixer(nn.Module, ABC):
    """Mixes information between tokens, causally."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: Any = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Mixes `x` (B, T, D), given `gaps` (B, T) and the `state` of the tokens before.

        Tokens where `valid` (B, T) is false are padding: they affect neither the state nor other tokens.
        """

    @abstractmethod
    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Forward cost on one sequence of `seq_len` tokens, of which a share of `read_frac` reads."""


def checked_inputs(x: Tensor, gaps: Tensor, valid: Tensor | None, d_model: int) -> tuple[Tensor, Tensor]:
    """X and gaps with zeros on padding, so that no value there, not even a NaN, reaches a valid token.

    Raises:
        ValueError: unless x is (B, T, d_model) and gaps are (B, T), finite and >= 0 on valid tokens. The values of gaps
            are not checked in compiled code, where they are known, nor while a CUDA graph is recorded or replayed.
    """
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x has shape {tuple(x.shape)}; give (batch, tokens, {d_model})")
    for name, given in (("gaps", gaps), ("valid", valid)):
        if given is not None and given.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; give {tuple(x.shape[:2])}, one entry a token")
    if valid is not None:
        x, gaps = torch.where(valid[..., None], x, 0.0), torch.where(valid, gaps, 0.0)
    if not checks_values() or (gaps.is_cuda and torch.cuda.is_current_stream_capturing()):
        return x, gaps  # a recording cannot wait for the device
    good = torch.isfinite(gaps) & (gaps >= 0)
    if not bool(good.all()):
        raise ValueError(f"gaps holds {gaps[~good][0].item()}; give times since the previous event, finite, 0 or more")
    return x, gaps


def check_state(state: Any, kind: type, n_batch: int) -> None:
    """Refuses a state that the call cannot continue.

    Args:
        state: state of an earlier call; None: there was none.
        kind: type of the state: a named tuple of tensors (B, ...), or of such tuples.
        n_batch: number of sequences of this call, B.

    Raises:
        ValueError: if the state is of another mixer or another number of sequences.
    """
    if state is None:
        return
    if not isinstance(state, kind):
        raise ValueError(f"state is a {type(state).__name__}; give the {kind.__name__} that this mixer returned")
    held: Any = state
    while not isinstance(held, Tensor):
        held = held[0]
    if held.shape[0] != n_batch:
        raise ValueError(f"state holds {held.shape[0]} sequences and x {n_batch}; continue the same ones")


def nothing_mixed(x: Tensor, gaps: Tensor, state: Any) -> MixerOutput:
    """Output of a call without tokens or without sequences; the state is unchanged."""
    return MixerOutput(
        y=x, state=state, trace=Trace.of_reads(torch.zeros_like(gaps, dtype=torch.bool), x.dtype), aux={}
    )


@runtime_checkable
class MixerConfig(Protocol):
    """A frozen dataclass that builds its mixer."""

    def build(self, d_model: int) -> Mixer:
        """A newly initialised mixer of width `d_model`."""
        ...
