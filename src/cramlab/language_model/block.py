"""A block of the CRAM language model, and what passes through a stack of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from cramlab.language_model.packed_rows import Documents
from cramlab.memory import CRAMLayer, CRAMState
from cramlab.memory.episodic import Buffer
from cramlab.mixer import MixerOutput, Path, Routing, Trace
from cramlab.model import Block
from cramlab.ops.plain import is_plain


class Tokens(NamedTuple):
    """What the blocks know about the tokens besides the residual stream.

    Attributes:
        gaps: time since the previous token, (B, T). Text has none, so each is 1.
        valid: false on padding, bool (B, T); None: all tokens are valid.
        documents: the documents of packed rows; None: each row is one.
    """

    gaps: Tensor
    valid: Tensor | None
    documents: Documents | None


class Passed(NamedTuple):
    """What a block returns: a flat tuple of tensors, as gradient checkpointing requires.

    Attributes:
        x: residual stream, (B, T, D).
        silent: residual stream in which this layer has not read, (B, T, D); None: `Routing.counterfactual` is false.
        consolidation: the consolidation loss, summed over sequences; None outside training.
        salience: the write gate's loss, summed over sequences; None: there is no write gate.
        gate_logit: logit of the read gate, (B, T); None: there is no read gate.
        scored: tokens that read, audits included, bool (B, T).
        chosen: tokens that read by the router's decision, bool (B, T).
        working: state of the working memory; None, like the fields after it, if no state was asked for.
        keys: keys in the buffer; see `Buffer`.
        values: see `Buffer`.
        times: see `Buffer`.
        filled: see `Buffer`.
        n_written: see `Buffer`.
    """

    x: Tensor
    silent: Tensor | None
    consolidation: Tensor | None
    salience: Tensor | None
    gate_logit: Tensor | None
    scored: Tensor
    chosen: Tensor
    working: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    times: Tensor | None
    filled: Tensor | None
    n_written: Tensor | None

    @property
    def state(self) -> CRAMState:
        """The mixer's state after the last token, if it was asked for."""
        working, *buffer = cast("tuple[Tensor, ...]", self[-6:])
        return CRAMState(working, Buffer(*buffer))

    def trace(self, has_target: Tensor, *, decides: bool) -> Trace:
        """The reads that the loss can judge: those at tokens with a target, bool (B, T).

        `decides` is true for a gate that learns a decision, and false for one that learns nats.
        """
        assert self.gate_logit is not None
        judged = Trace.of_reads(self.scored & has_target, self.gate_logit.dtype)
        # What a gate of nats lets go is known; the probability of a decision says how sure the gate is.
        probability = torch.sigmoid(self.gate_logit.detach()) if decides else self.chosen.to(self.gate_logit.dtype)
        return judged._replace(gate_prob=probability, gate_logit=self.gate_logit)


class CRAMBlock(Block, GradientCheckpointingLayer):
    """A block that can also return what it would without its reads."""

    def forward(
        self, x: Tensor, tokens: Tokens, routing: Routing, *state: Tensor, keeps_state: bool = True
    ) -> tuple[Tensor | None, ...]:
        """One pass over x (B, T, D); returns a `Passed` as a tuple, without a state unless `keeps_state`."""
        before = CRAMState(state[0], Buffer(*state[1:])) if state else None
        mixed = self._mixed(x, tokens, before, routing)
        silent = None if mixed.y_without_reads is None else self.finish(x, mixed.y_without_reads)
        losses = _summed(mixed.aux, "consolidation"), _summed(mixed.aux, "salience")
        y, trace = self.finish(x, mixed.y), mixed.trace
        chosen = trace.path == int(Path.EPISODIC)
        kept = (mixed.state.working, *mixed.state.buffer) if keeps_state else (None,) * 6
        return y, silent, *losses, trace.gate_logit, trace.scored, chosen, *kept

    def _mixed(self, x: Tensor, tokens: Tokens, state: CRAMState | None, routing: Routing) -> MixerOutput:
        if tokens.documents is None:
            return self.mix(x, tokens.gaps, state, tokens.valid, routing)
        return tokens.documents.mix(self.mixer, self.mixer_input(x), tokens.gaps, tokens.valid, routing)

    @property
    def steps(self) -> bool:
        """Whether a decoder may bypass `forward`: no hooks or adapters on block and mixer, and no router that draws."""
        return is_plain(self, CRAMBlock) and is_plain(self.mixer, CRAMLayer) and not self._draws

    @property
    def _draws(self) -> bool:
        return isinstance(self.mixer, CRAMLayer) and self.mixer.config.router.name == "random"


def _summed(losses: Mapping[str, Tensor], name: str) -> Tensor | None:
    return losses[name].sum() if name in losses else None
