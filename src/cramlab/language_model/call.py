"""What a call of a CRAM language model is given, passes on within the model, and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from cramlab.language_model.block import Passed
from cramlab.language_model.packed_rows import Documents


class Call(NamedTuple):
    """A call of the model whose arguments have been checked.

    Attributes:
        valid: false on padding, bool (B, T); None: all tokens are valid.
        documents: the documents of packed rows; None: each row is one.
        target: token that each is to predict, int64 (B, T), -100 where there is none; None: no loss was asked for.
        labels: the labels, if the targets are simply these shifted by one; else None.
        cache: state of the tokens before, which is continued in place; None: no state is kept.
        use_cache: whether the cache is returned.
        n_items: see `num_items_in_batch` in `CRAMForCausalLM.forward`.
    """

    valid: Tensor | None
    documents: Documents | None
    target: Tensor | None
    labels: Tensor | None
    cache: Cache | None
    use_cache: bool
    n_items: int | Tensor | None


class Stacked(NamedTuple):
    """What the blocks returned.

    Attributes:
        x: residual stream after the last block, (B, T, D).
        hidden: residual stream before each block.
        aux: losses of the memories by name, one for each layer that has them, summed over sequences.
        silent: residual stream in which the judged layer has not read, (B, T, D); None: no layer is judged.
        judged: what the judged layer's block returned; None: no layer is judged.
        threshold: threshold of the judged layer's gate, scalar; None: it has none, or no layer is judged.
        margins: output of the read gate of each layer that has one, (B, T); see `BenefitGate`.
        unjudged: those of them that are of other layers than the judged one.
    """

    x: Tensor
    hidden: tuple[Tensor, ...]
    aux: dict[str, list[Tensor]]
    silent: Tensor | None
    judged: Passed | None
    threshold: Tensor | None
    margins: list[Tensor]
    unjudged: list[Tensor]


@dataclass
class CRAMOutput(CausalLMOutputWithPast):
    """Output of a call.

    Attributes:
        gate_margins: output of the read gate of each layer that has one, (B, T), detached: above 0 where the token
            reads; None unless `output_gates` asks for it.
    """

    gate_margins: tuple[Tensor, ...] | None = None
