"""A call of a patched model, executed: the window for every token, the far read for those that a rule lets read.

A forward pass writes nothing to the model: what belongs to a call lives on a stack of the thread that makes it, so any
number of threads can ask one model. Gates decide on the host, so compiled code stops at each attention and goes on
after it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from cramlab.consolidation.far_reads import Scoring, far_read, read_by_heads, window_read
from cramlab.consolidation.growing_cache import let_grow
from cramlab.consolidation.patch import Counts, Decision, FarReads, Installation, Seen
from cramlab.consolidation.visibility import Mask, Visibility, far_tokens, visibility
from cramlab.errors import ConsolidationError

# Attention functions of patched models, as `config._attn_implementation` names them, by that of the original.
NAMES = {"sdpa": "cramlab", "eager": "cramlab_eager"}
_REFUSED = {  # arguments of an attention function that change its answer and are not carried over
    "s_aux": "learned attention sinks",
    "position_bias": "a position bias",
    "cache": "a paged cache (continuous batching)",
    "sliding_window": "a sliding window",
}


@dataclass
class _Call:
    """One call of an attention module, on the stack of its thread.

    Attributes:
        module: the attention module.
        hidden: what it sees, (B, T, D).
        decided: whether the patch has been asked.
        decision: what it said; None also where nothing was far.
        correction: to be added to the output projection's answer, (B, T, D).
        corrected: whether it has been.
    """

    module: nn.Module
    hidden: Tensor
    decided: bool = False
    decision: Decision | None = None
    correction: Tensor | None = None
    corrected: bool = False


@dataclass
class _Pass:
    """One forward pass of the model without its head, on the stack of its thread.

    Attributes:
        module: that model.
        start: place of the first token: tokens that were in the cache before the call.
        masks: the last mask that was read, and what it says.
    """

    module: nn.Module
    start: int
    masks: tuple[Tensor | None, Visibility] | None = None

    def visibility(self, mask: Tensor | None, n_batch: int, n_heads: int, n_tokens: int) -> Visibility:
        """What a mask says; the one that all layers share is read once."""
        if self.masks is None or self.masks[0] is not mask:
            self.masks = mask, visibility(mask, n_batch, n_heads, n_tokens, self.start)
        return self.masks[1]


class _Stacks(threading.local):
    """What the calls of a thread have in hand."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.passes: list[_Pass] = []


_stacks = _Stacks()
_Held = TypeVar("_Held", _Call, _Pass)
_Function = TypeVar("_Function", bound=Callable[..., Any])
closed_here: ContextVar[frozenset[FarReads]] = ContextVar("closed patches", default=frozenset())


def _on_host(function: _Function) -> _Function:
    """Keeps a function out of compiled code; its type stays as it is."""
    return cast(_Function, torch.compiler.disable(function))


def _push(stack: list[_Held], one: _Held) -> None:
    """Puts a call on a stack; what an interrupt (Ctrl-C skips hooks) has left there from its module on goes first."""
    stale = next((i for i, old in enumerate(stack) if old.module is one.module), len(stack))
    stack[stale:] = [one]


@_on_host
def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Before attention: keeps what it sees."""
    _push(_stacks.calls, _Call(module, args[0] if args else kwargs["hidden_states"]))


@_on_host
def correct(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    """After the output projection: adds what the rule answers instead of reads."""
    if not _stacks.calls or (correction := _stacks.calls[-1].correction) is None:
        return None
    _stacks.calls[-1].corrected = True
    return output + correction.to(output.dtype)


@_on_host
def leave(module: nn.Module, _: Any, output: Any) -> None:
    """After attention, also when it failed (there is no output then)."""
    if not _stacks.calls or _stacks.calls[-1].module is not module:
        return
    call = _stacks.calls.pop()
    if output is not None and call.correction is not None and not call.corrected:
        raise ConsolidationError(
            "an output projection was replaced after the model was patched (peft's merge_and_unload does so); "
            "remove(model), then patch it again"
        )


@_on_host
def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Before a forward pass: refuses what would be answered wrongly, and takes the place of the first token."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments if args else kwargs
    given = given | given.get("kwargs", {})
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    made: Installation = getattr(module, Installation.ATTRIBUTE)
    start = 0
    if isinstance(cache, Cache):
        let_grow(cache)
        start = int(cache.get_seq_length(made.cache_layer))
    run = _Pass(module, start)
    _push(_stacks.passes, run)
    if made.layer in closed_here.get():
        return
    if torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage]
        raise ConsolidationError("torch.jit.trace would fix who reads; trace the original, or use torch.compile")
    if made.implementation == "eager" and _asks_for_weights(module.config, given):
        raise ConsolidationError("skipped reads have no attention weights; ask for them inside closed(model)")
    if not getattr(module.config, "is_causal", True):
        raise ConsolidationError("config.is_causal is false; a consolidated model must be causal")
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 2 and tokens is not None and len(mask) != len(tokens):
        raise ConsolidationError(f"the attention mask has {len(mask)} rows for {len(tokens)} sequences; give one each")
    if isinstance(mask, Tensor) and mask.ndim > 2 and tokens is not None:
        run.visibility(mask, tokens.shape[0], made.n_heads, tokens.shape[1])


def _asks_for_weights(config: Any, given: dict[str, Any]) -> bool:
    asked = given.get("output_attentions")
    return bool(getattr(config, "output_attentions", False) if asked is None else asked)


@_on_host
def end(module: nn.Module, _: Any, __: Any) -> None:
    """After a forward pass, also when it failed."""
    if _stacks.passes and _stacks.passes[-1].module is module:
        _stacks.passes.pop()


@_on_host
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of patched models; the original's where there is no patch, or a closed one."""
    plain = sdpa_attention_forward
    if module.config._attn_implementation == NAMES["eager"]:  # type: ignore[union-attr]
        plain = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    layer = getattr(module, FarReads.CHILD, None)
    if layer is None or layer in closed_here.get():
        return plain(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise ConsolidationError("attention dropout and skipped reads do not go together; call model.eval()")
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ConsolidationError(f"a consolidated layer cannot have {what}")
    if (
        not kwargs.get("is_causal", getattr(module, "is_causal", True))
        or not _stacks.calls
        or _stacks.calls[-1].module is not module
    ):
        raise ConsolidationError("a consolidated layer must be causal, and called through its attention module")
    scale = kwargs.get("scaling")
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"))

    def original() -> Tensor:
        return plain(module, query, key, value, attention_mask, **kwargs)[0]

    n_tokens, run = query.shape[2], _stacks.passes[-1] if _stacks.passes else None
    if run is None:  # a block that is called by itself, or again in a backward pass
        run = _Pass(module, (n_tokens if attention_mask is None and n_tokens > 1 else key.shape[2]) - n_tokens)
    seen, n_keys = run.visibility(attention_mask, *query.shape[:3]), run.start + n_tokens
    if key.shape[2] < n_keys:
        raise ConsolidationError(
            f"the cache holds {key.shape[2]} of {n_keys} keys; a consolidated layer needs a cache that drops none"
        )
    written = key[:, :, :n_keys], value[:, :, :n_keys]
    return _attend(layer, _stacks.calls[-1], original, query, *written, seen, scoring), None


def _attend(
    layer: FarReads, call: _Call, original: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor,
    seen: Visibility, scoring: Scoring,
) -> Tensor:  # fmt: skip
    """Heads (B, T, H, D); what is added to the layer's answer is left on the call for the output projection's hook.

    Args:
        layer: the patch.
        call: of the attention module.
        original: the unpatched attention on the same arguments.
        query: the newest tokens, (B, H, T, D).
        key: all that has been written, (B, H / G, S, D).
        value: likewise.
        seen: which keys are visible.
        scoring: from products to scores.
    """
    n_batch, _, n_tokens, _ = query.shape
    start = key.shape[2] - n_tokens
    causal = n_batch * (n_tokens * (2 * key.shape[2] - n_tokens + 1) // 2)
    if isinstance(seen, Mask):
        causal = int(seen.seen().expand(n_batch, -1, -1).sum())
    counts = Counts(tokens=n_batch * n_tokens, causal_pairs=causal)
    far = far_tokens(seen, n_batch, n_tokens, start, layer.window + layer.n_sinks, query.device)
    n_far = int(far.sum())
    if not n_far or layer.reads_all:  # the original is as cheap, and exact
        counts.far_tokens = counts.far_reads = n_far
        counts.window_pairs = causal
        heads, decision = original(), None
    else:
        near = window_read(query, key, value, window=layer.window, n_sinks=layer.n_sinks, scoring=scoring, seen=seen)
        sight = Seen(call.hidden, near.heads, near.masses, far, start, original)
        # Attention that asks twice reads for the same tokens (DiffLlama).
        decision = call.decision if call.decided else _checked(layer.decide(sight), layer, sight)
        counts.far_tokens, counts.window_pairs = n_far, near.n_scored
        heads = near.heads
        if decision is None:
            heads, counts.far_reads = sight.full, n_far
        elif (reads := decision[0]).is_floating_point():
            by_head = reads.view(*far.shape, -1)  # (B, T, H or 1)
            weight = torch.where(far[..., None], by_head, 1.0)[..., None]
            heads, counts.far_reads = heads + weight * (sight.full - heads), float(by_head.detach()[far].mean(-1).sum())
        elif reads.ndim == 3:
            reads = reads & far[..., None]
            counts.far_reads = float(reads.double().mean(-1).sum())
            heads, counts.far_pairs = read_by_heads(heads, query, key, value, reads, scoring=scoring, seen=seen)
        else:
            reads = reads & far
            counts.far_reads = int(reads.sum())
            if counts.far_reads:
                answers, counts.far_pairs = far_read(query, key, value, reads, scoring=scoring, seen=seen)
                heads = heads.index_put(reads.nonzero(as_tuple=True), answers)
        if isinstance(seen, Mask) and not bool(seen.own.all()):
            heads = torch.where(seen.own[..., None, None], heads, sight.full)
        if layer.never_reads:
            counts.unreachable = n_far  # with every such token one more key has left the window
    if not call.decided:
        layer.tally.add(counts)
        call.decided, call.decision = True, decision
        call.correction = None if decision is None else _correction(far, *decision)
    return heads


def _checked(decision: Decision | None, layer: FarReads, seen: Seen) -> Decision | None:
    """What a rule has said, unless it has another shape or type than `FarReads.decide` asks for."""
    if decision is None:
        return None
    reads, answer = decision
    shapes = seen.far.shape, seen.near.shape[:3]
    if reads.shape not in shapes or not (reads.dtype == torch.bool or reads.is_floating_point()):
        raise ConsolidationError(
            f"{type(layer).__name__}.decide gave reads {tuple(reads.shape)} of {reads.dtype}; give bool or a floating "
            f"type, {tuple(shapes[0])} or {tuple(shapes[1])}"
        )
    if answer is not None and answer.shape[:2] != seen.far.shape:
        raise ConsolidationError(
            f"{type(layer).__name__}.decide gave answers {tuple(answer.shape)}; give (batch, tokens, width), "
            f"here {tuple(seen.far.shape)} and the width of the layer's answer"
        )
    return decision


def _correction(far: Tensor, reads: Tensor, answer: Tensor | None) -> Tensor | None:
    """What is added to a layer's answer, (B, T, D); None: nothing."""
    if answer is None:
        return None
    if reads.is_floating_point():
        by_token = reads.amax(-1) if reads.ndim == 3 else reads
        return (1 - torch.where(far, by_token, 1.0))[..., None] * answer
    skips = far & ~(reads.any(-1) if reads.ndim == 3 else reads)
    return torch.where(skips[..., None], answer, 0.0)


for _implementation, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(NAMES[_implementation], _attention)
    AttentionMaskInterface.register(NAMES[_implementation], _mask)
