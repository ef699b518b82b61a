"""One attention sub-layer of a decode step: near keys, gate, far keys behind it, adapter; no value reaches the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cramlab.consolidation.patch.reads import LEAST_MASS
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.errors import ConsolidationError
from cramlab.ops.gated_decode import attention

NAME = "cramlab_step"  # in `config._attn_implementation`; it has no mask function, so no mask is built
_REFUSED = ("softcap", "s_aux", "sliding_window", "position_bias", "indices", "block_indices")


@dataclass
class Now:
    """What the layers of a step share while it runs.

    Attributes:
        first: position of each sequence's first visible key, int64 (B,).
        end: position behind each sequence's newest key, int64 (B,).
        thresholds: scores above which a gate opens, by layer and sequence, (L, B).
        reads: whether the gate of a layer opened, bool (B,), one a layer with a gate, in the order of execution.
    """

    first: Tensor
    end: Tensor
    thresholds: Tensor
    reads: list[Tensor] = field(default_factory=list)


class Running:
    """Holds the `Now` of the step that is running; None between steps."""

    now: Now | None = None


class Gate(nn.Module):
    """Executes one attention sub-layer; it is a child of the attention module.

    Args:
        layer: gate and adapter, in 32 bits; None: the sub-layer reads all keys.
        place: row of the layer among the thresholds.
        running: shared by all layers.
    """

    CHILD = "cramlab_gate"

    def __init__(self, layer: ConsolidatedAttention | None, place: int, running: Running) -> None:
        super().__init__()
        self.layer, self.place, self.running = layer, place, running
        self.hidden: Tensor | None = None
        self.answer: Tensor | None = None

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Before attention: keeps its input, (B, 1, D)."""
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def heads(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Outputs of the heads, (B, H, D); the adapter's answer is left for `correct`, 0 where it is not asked.

        Args:
            query: (B, H, D).
            key: static buffer, (B, H / G, S, D).
            value: static buffer, (B, H / G, S, D).
            scale: factor of the scores.
        """
        now = self.running.now
        assert now is not None
        if self.layer is None:
            return attention.full_read(query, key, value, now.first, now.end, scale)
        assert self.hidden is not None
        layer, positions = self.layer, (now.first, now.end, self.layer.window, self.layer.n_sinks, scale)
        near, masses = attention.near_read(query, key, value, *positions)
        masses_seen = masses.clamp(min=LEAST_MASS)
        features = torch.cat([self.hidden[:, 0], near.flatten(1), masses_seen.flatten(1)], dim=-1)
        x, code = layer.inner(features)
        n_keys = now.end - now.first
        reads = layer.score(x, code, n_keys) > now.thresholds[self.place]
        now.reads.append(reads)
        skips = ~reads & (n_keys > layer.window + layer.n_sinks)
        self.answer = torch.where(skips[:, None], layer.answer(code), 0.0)[:, None]
        return attention.gated_read((near, masses), reads[:, None], query, key, value, *positions)

    def correct(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """After the output projection: adds the adapter's answer for the sequences that did not read."""
        answer, self.answer, self.hidden = self.answer, None, None
        return output if answer is None else output + answer.to(output.dtype)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of a step's model."""
    gate = cast("Gate | None", getattr(module, Gate.CHILD, None))
    if gate is None or gate.running.now is None or query.shape[2] != 1 or attention_mask is not None:
        raise ConsolidationError("the model of a DecodeStep takes one token a sequence; call the step, not its model")
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ConsolidationError(f"a DecodeStep does not support the attention's {name}; use the patched model")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return gate.heads(query[:, :, 0], key, value, scale)[:, None], None


AttentionInterface.register(NAME, _attention)
