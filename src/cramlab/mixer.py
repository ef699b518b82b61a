"""The one contract between a model and whatever mixes tokens: `Mixer`, `Routing`, `MixerOutput`, `Cost`."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Path(enum.IntEnum):
    """Which memory answered a token."""

    WORKING = 0
    EPISODIC = 1
    SEMANTIC = 2


class Bounds(NamedTuple):
    """What a call executes at most in each of its sequences; the first so many do.

    Attributes:
        reads: tokens that read, at least 1; those after them do without.
        writes: tokens that a write gate lets pass, at least 1; those after them are not written. Without such a gate
            all are, whatever this says.
    """

    reads: int
    writes: int


class Routing(NamedTuple):
    """What the caller asks of a router on one call. The default is the router's own rule, as decoding uses it.

    Attributes:
        read_all: every valid token reads (the encoding phase).
        audits: tokens that read whatever a learning gate says, bool (B, T), so that training sees what skipping
            costs. Other routers take no notice.
        counterfactual: also return the output that the layer would have given without its reads, where it can.
        temperature: of sampled routers; None means no sampling.
        oracle_reads: bool (B, T), for the oracle router alone.
        generator: source of every random choice in the call; None means torch's global one.
        bounds: known beforehand, so that no size depends on a gate and a CUDA graph can record the call, gradients too.
            For a `CRAMLayer` whose router decides before it reads; other mixers take no notice. Where they bind, the
            last tokens of a sequence neither read nor teach the gates: in training keep them wide.
        by_sequence: `MixerOutput.aux` holds the sum over the tokens of each sequence, (B,), instead of means over all,
            so that the parts of a batch add up to the whole. For a `CRAMLayer`; other mixers have no such losses.
    """

    read_all: bool = False
    audits: Tensor | None = None
    counterfactual: bool = False
    temperature: float | None = None
    oracle_reads: Tensor | None = None
    generator: torch.Generator | None = None
    bounds: Bounds | None = None
    by_sequence: bool = False


class Trace(NamedTuple):
    """What a mixer did with each token. All (B, T).

    Attributes:
        path: `Path` chosen by the router, int64; the largest weight of a soft one.
        attended: the token's output uses attention over the buffer, bool.
        scored: the token was scored against the buffer for any reason, audits included, bool.
        gate_prob: probability that the router gives to reading, 0 to 1.
        gate_logit: the same before the sigmoid; None for a router that is not trained on benefit.
        quality: how well the semantic answer matches what was read (Eq. 6), 0 to 1; NaN where unknown.
        written: the token was put into the buffer, bool; None: all that are valid.
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
        """Of a mixer that scores exactly the tokens which use attention, bool (B, T); the others recur."""
        return cls(
            path=torch.where(attended, int(Path.EPISODIC), int(Path.WORKING)),
            attended=attended,
            scored=attended,
            gate_prob=attended.to(dtype),
        )


class MixerOutput(NamedTuple):
    """Everything that a call produced; nothing is left behind on the module.

    A named tuple, like all that passes through a model: Lightning Fabric walks tuples but refuses frozen dataclasses.

    Attributes:
        y: output, (B, T, D).
        state: to be passed to the next call on the continuation of the same sequences.
        trace: what was done with each token.
        aux: named scalar losses, unweighted; see `Routing.by_sequence`.
        y_without_reads: the output without any read, (B, T, D); None unless asked for.
    """

    y: Tensor
    state: Any
    trace: Trace
    aux: dict[str, Tensor]
    y_without_reads: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a mixer on one sequence, multiply and add counted as two. Of a forward pass unless said otherwise.

    Attributes:
        projection_flops: of all work whose amount does not depend on the reads.
        read_flops: of scoring and mixing, when the stated share of tokens reads.
        state_bytes: carried from token to token when decoding, at 4 bytes a number.
        reads: tokens scored against a buffer for any reason.
        parameter_bytes: of the mixer; 0 where it does not say.
        parts: `flops` by what they are spent on; empty where the mixer does not say.
    """

    projection_flops: float
    read_flops: float
    state_bytes: int
    reads: float = 0.0
    parameter_bytes: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All of it."""
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
        """Mixes `x` (B, T, D) given `gaps` (B, T) and what came before (`state`).

        Tokens where `valid` (B, T) is false are padding: they change no state and no other token.
        """

    @abstractmethod
    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """Forward cost on one sequence of `seq_len` tokens of which `read_frac` read."""


def checked_inputs(x: Tensor, gaps: Tensor, valid: Tensor | None, d_model: int) -> tuple[Tensor, Tensor]:
    """X and gaps with zeros on padding, so that nothing that stands there, not even a NaN, can reach a valid token.

    Raises:
        ValueError: unless x is (B, T, d_model) and gaps are (B, T), finite and not negative on valid tokens; what is in
            the gaps is not looked at while a CUDA graph is recorded, nor when it is replayed, nor in compiled code.
    """
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x has shape {tuple(x.shape)}; give (batch, tokens, {d_model})")
    for name, given in (("gaps", gaps), ("valid", valid)):
        if given is not None and given.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; give {tuple(x.shape[:2])}, one entry a token")
    if valid is not None:
        x, gaps = torch.where(valid[..., None], x, 0.0), torch.where(valid, gaps, 0.0)
    if torch.compiler.is_compiling() or (gaps.is_cuda and torch.cuda.is_current_stream_capturing()):
        return x, gaps  # a recording cannot wait for an answer
    good = torch.isfinite(gaps) & (gaps >= 0)
    if not bool(good.all()):
        raise ValueError(f"gaps holds {gaps[~good][0].item()}; give times since the previous event, finite, 0 or more")
    return x, gaps


def check_state(state: Any, kind: type, n_batch: int) -> None:
    """Refuses a state that cannot be continued.

    Args:
        state: carried from an earlier call; None: there was none.
        kind: a named tuple of tensors (B, ...), or of such tuples, as the mixer returns it.
        n_batch: sequences of this call, B.

    Raises:
        ValueError: for a state of another mixer, or of another number of sequences.
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
    """The output of a call without tokens or without sequences: nothing changes."""
    return MixerOutput(
        y=x, state=state, trace=Trace.of_reads(torch.zeros_like(gaps, dtype=torch.bool), x.dtype), aux={}
    )


@runtime_checkable
class MixerConfig(Protocol):
    """A frozen dataclass that knows how to build its mixer."""

    def build(self, d_model: int) -> Mixer:
        """A freshly initialised mixer of width `d_model`."""
        ...
