"""A block of the CRAM language model, and what passes through a stack of them."""

from __future__ import annotations

from typing import NamedTuple

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
        silent: residual stream in which one layer has not read, (B, T, D); None: that layer comes later, if at all.
        consolidation: the consolidation loss, summed over sequences; None outside training.
        salience: the write gate's loss, summed over sequences; None: there is no write gate.
        gate_logit: logit of the read gate, (B, T); None: there is no read gate.
        scored: tokens that read, audits included, bool (B, T).
        chosen: tokens that read by the router's decision, bool (B, T).
        working: state of the working memory.
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
    working: Tensor
    keys: Tensor
    values: Tensor
    times: Tensor
    filled: Tensor
    n_written: Tensor

    @property
    def state(self) -> CRAMState:
        """The mixer's state after the last token."""
        return CRAMState(self.working, Buffer(*self[-5:]))

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
    """A block that also carries the residual stream in which one of the layers has not read."""

    def forward(
        self, x: Tensor, silent: Tensor | None, tokens: Tokens, routing: Routing, *state: Tensor
    ) -> tuple[Tensor | None, ...]:
        """One pass over x (B, T, D) and, if given, the silent stream (B, T, D); returns a `Passed` as a tuple."""
        before = CRAMState(state[0], Buffer(*state[1:])) if state else None
        mixed = self._mixed(x, tokens, before, routing)
        if mixed.y_without_reads is not None:
            silent = self.finish(x, mixed.y_without_reads)
        elif silent is not None:
            silent = self.finish(silent, self._mixed(silent, tokens, before, routing).y)
        losses = (None if (loss := mixed.aux.get(name)) is None else loss.sum() for name in Passed._fields[2:4])
        y, trace = self.finish(x, mixed.y), mixed.trace
        chosen = trace.path == int(Path.EPISODIC)
        return y, silent, *losses, trace.gate_logit, trace.scored, chosen, mixed.state[0], *mixed.state.buffer

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
