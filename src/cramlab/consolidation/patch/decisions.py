"""What a rule decided: whether it has the shapes that it must have, and what it adds to a layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.errors import ConsolidationError


def checked(decision: Decision | None, layer: FarReads, seen: Seen) -> Decision | None:
    """The decision of a rule; refused when a shape or type differs from what `FarReads.decide` documents."""
    if decision is None:
        return None
    reads, answer = decision
    shapes = seen.far.shape, seen.near.shape[:3]
    if reads.shape not in shapes or not (reads.dtype == torch.bool or reads.is_floating_point()):
        raise ConsolidationError(
            f"{type(layer).__name__}.decide returned reads of shape {tuple(reads.shape)} and type {reads.dtype}; "
            f"return bool or a floating type, of shape {tuple(shapes[0])} or {tuple(shapes[1])}"
        )
    if answer is not None and answer.shape[:2] != seen.far.shape:
        raise ConsolidationError(
            f"{type(layer).__name__}.decide returned an answer of shape {tuple(answer.shape)}; return (batch, tokens, "
            f"d_model), here {(*seen.far.shape, seen.hidden.shape[-1])}"
        )
    return decision


def correction(far: Tensor, reads: Tensor, answer: Tensor | None, *, all_skip: bool) -> Tensor | None:
    """What is added to a layer's output, (B, T, D); None: nothing. `all_skip`: every token has far keys, none reads."""
    if answer is None:
        return None
    if reads.is_floating_point():
        by_token = reads.amax(-1) if reads.ndim == 3 else reads
        return (1 - torch.where(far, by_token, 1.0))[..., None] * answer
    if all_skip:
        return answer
    skips = far & ~(reads.any(-1) if reads.ndim == 3 else reads)
    return torch.where(skips[..., None], answer, 0.0)
