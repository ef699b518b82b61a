"""How a patched model executes a call: the window for every token, a far read for the tokens that a rule chose.

A forward pass writes nothing to the model. The state of a call lives on a stack of the calling thread, so several
threads can use one model at a time. Rules decide on the host, so compiled code breaks its graph at each attention.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.patch.decisions import checked, correction
from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.consolidation.patch.growing_cache import let_grow
from cramlab.consolidation.patch.originals import NAMES, Original, register
from cramlab.consolidation.patch.reads import Scoring, far_read, read_by_heads, window_read
from cramlab.consolidation.patch.visibility import Mask, Visibility, n_keys_seen, visibility
from cramlab.errors import ConsolidationError

_REFUSED = {  # arguments of an attention function that change its output and that a patch does not implement
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
    "position_bias": "a position bias",
    "cache": "a paged cache (continuous batching)",
    "sliding_window": "a sliding window",
}


@dataclass
class Installation:
    """What `install` has changed; it is kept at the model without its head.

    Attributes:
        implementation: name of the original's attention function.
        handles: handles of the hooks at that model.
        layer: one of the patches.
        n_heads: number of query heads of its attention.
        cache_layer: index of the cache layer that its attention writes to.
        write: writes the consolidation into the folder that the model is saved to; None: the patch has no record.
    """

    implementation: str
    handles: list[RemovableHandle]
    layer: FarReads
    n_heads: int
    cache_layer: int
    write: Callable[[nn.Module, Path], None] | None = None

    ATTRIBUTE: ClassVar[str] = "cramlab_installation"


@dataclass
class _Call:
    """One call of an attention module, on the stack of its thread.

    Attributes:
        module: the attention module.
        hidden: input of attention, (B, T, D).
        args: positional arguments of the module.
        kwargs: keyword arguments of the module.
        decided: whether the rule has been called.
        decision: what it returned; None also where no token had far keys.
        correction: what is added to the output of the output projection, (B, T, D).
        corrected: whether it has been added.
        answering: while the module is run again for `Seen.added`, what its attention returns.
        answer: what the output projection then returned, (B, T, D).
    """

    module: nn.Module
    hidden: Tensor
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    decided: bool = False
    decision: Decision | None = None
    correction: Tensor | None = None
    corrected: bool = False
    answering: Literal["full", "near"] | None = None
    answer: Tensor | None = None

    def again(self, answering: Literal["full", "near"]) -> Tensor:
        """Output of the output projection, (B, T, D), if all tokens had full attention, or the window alone."""
        if any(isinstance(value, Cache) for value in (*self.args, *self.kwargs.values())):
            raise ConsolidationError("what far reads add behind a gate or norm needs a pass without a cache")
        self.answering = answering
        try:
            self.module.forward(*self.args, **self.kwargs)
        finally:
            self.answering = None
        return cast(Tensor, self.answer)


class _Reach(NamedTuple):
    """Which tokens of a pass have far keys; layers with the same window share it.

    Attributes:
        n_keys: number of keys that each token sees, itself included, int64 (B, T); 0 for padding.
        far: whether a token sees more than its window and first keys, bool (B, T).
        n_far: number of these tokens.
        causal_pairs: pairs of query and key that full causal attention scores, for one head.
    """

    n_keys: Tensor
    far: Tensor
    n_far: int
    causal_pairs: int


class _Pass:
    """One forward pass of the model without its head, on the stack of its thread.

    Args:
        module: that model.
        start: position of the first token: number of tokens in the cache before the call.
    """

    def __init__(self, module: nn.Module, start: int) -> None:
        self.module, self.start = module, start
        self._mask: tuple[Tensor | None, Visibility] | None = None
        self._reach: tuple[Visibility, tuple[Any, ...], _Reach] | None = None

    def visibility(self, mask: Tensor | None, n_batch: int, n_heads: int, n_tokens: int) -> Visibility:
        """What a mask lets tokens see; a mask that layers share is analysed once."""
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, visibility(mask, n_batch, n_heads, n_tokens, self.start)
        return self._mask[1]

    def reach(self, seen: Visibility, query: Tensor, n_near: int) -> _Reach:
        """Which tokens see more than their `n_near` nearest and first keys; query (B, H, T, D)."""
        n_batch, _, n_tokens, _ = query.shape
        asked = (n_batch, n_tokens, n_near, query.device)
        if self._reach is None or self._reach[0] is not seen or self._reach[1] != asked:
            n_keys = n_keys_seen(seen, n_batch, n_tokens, self.start, query.device)
            far = n_keys > n_near
            pairs = n_batch * (n_tokens * (2 * self.start + n_tokens + 1) // 2)
            if isinstance(seen, Mask):
                pairs = int(seen.seen().expand(n_batch, -1, -1).sum())
            self._reach = seen, asked, _Reach(n_keys, far, int(far.sum()), pairs)
        return self._reach[2]


class _Stacks(threading.local):
    """The calls and passes of one thread that have begun and not ended."""

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
    """Puts a call on a stack, after removing what an interrupt left there (Ctrl-C skips the hooks that end a call)."""
    stale = next((i for i, old in enumerate(stack) if old.module is one.module), len(stack))
    stack[stale:] = [one]


@_on_host
def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Before attention: keeps its input."""
    _push(_stacks.calls, _Call(module, args[0] if args else kwargs["hidden_states"], args, kwargs))


@_on_host
def correct(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    """After the output projection: adds the rule's answer for the tokens that do not read."""
    if not _stacks.calls:
        return None
    if _stacks.calls[-1].answering is not None:
        _stacks.calls[-1].answer = output
    if (correction := _stacks.calls[-1].correction) is None:
        return None
    _stacks.calls[-1].corrected = True
    return output + correction.to(output.dtype)


@_on_host
def leave(module: nn.Module, _: Any, output: Any) -> None:
    """After attention, also when it raised an error (there is no output then)."""
    if not _stacks.calls or _stacks.calls[-1].module is not module:
        return
    call = _stacks.calls.pop()
    if output is not None and call.correction is not None and not call.corrected:
        raise ConsolidationError(
            "an output projection was replaced after the model was patched (peft's merge_and_unload does this); "
            "call remove(model), then patch the model again"
        )


@_on_host
def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Before a forward pass: refuses calls that would be answered wrongly; keeps the position of the first token."""
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
        raise ConsolidationError(
            "torch.jit.trace would record one decision for all inputs; trace the original model, or use torch.compile"
        )
    if made.implementation == "eager" and _asks_for_weights(module.config, given):
        raise ConsolidationError(
            "output_attentions: skipped reads have no attention weights; ask for them inside closed(model)"
        )
    if not getattr(module.config, "is_causal", True):
        raise ConsolidationError(
            "config.is_causal = False: a consolidated model must be causal; set it to True, or call remove(model)"
        )
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 2 and tokens is not None and len(mask) != len(tokens):
        raise ConsolidationError(
            f"attention_mask has {len(mask)} rows for {len(tokens)} sequences; give one row for each sequence"
        )
    if isinstance(mask, Tensor) and mask.ndim > 2 and tokens is not None:
        run.visibility(mask, tokens.shape[0], made.n_heads, tokens.shape[1])


def _asks_for_weights(config: Any, given: dict[str, Any]) -> bool:
    asked = given.get("output_attentions")
    return bool(getattr(config, "output_attentions", False) if asked is None else asked)


@_on_host
def end(module: nn.Module, _: Any, __: Any) -> None:
    """After a forward pass, also when it raised an error."""
    if _stacks.passes and _stacks.passes[-1].module is module:
        _stacks.passes.pop()


@_on_host
def _attention(
    originals: Original,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of patched models; `originals` gives a module's own.

    The module's own answers at layers without a patch and where it is closed.
    """
    plain = originals(module)
    layer = getattr(module, FarReads.CHILD, None)
    if layer is None or layer in closed_here.get():
        return plain(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise ConsolidationError("a consolidated layer cannot apply attention dropout; call model.eval()")
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ConsolidationError(
                f"a consolidated layer does not support {what}; use the original inside closed(model)"
            )
    if (
        not kwargs.get("is_causal", getattr(module, "is_causal", True))
        or not _stacks.calls
        or _stacks.calls[-1].module is not module
    ):
        raise ConsolidationError("a consolidated layer must be causal and be called through its attention module")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scoring = Scoring(scale, kwargs.get("softcap"), kwargs.get("s_aux"))

    def original() -> Tensor:
        return plain(module, query, key, value, attention_mask, **kwargs)[0]

    n_tokens, run = query.shape[2], _stacks.passes[-1] if _stacks.passes else None
    if run is None:  # a block that is called on its own, or again in a backward pass
        run = _Pass(module, (n_tokens if attention_mask is None and n_tokens > 1 else key.shape[2]) - n_tokens)
    seen, n_keys = run.visibility(attention_mask, *query.shape[:3]), run.start + n_tokens
    if key.shape[2] < n_keys:
        raise ConsolidationError(
            f"the cache holds {key.shape[2]} of {n_keys} keys; use a cache that drops none, such as DynamicCache"
        )
    reach = run.reach(seen, query, layer.window + layer.n_sinks)
    written = (key, value) if key.shape[2] == n_keys else (key[:, :, :n_keys], value[:, :, :n_keys])
    heads = _attend(layer, _stacks.calls[-1], original, query, *written, seen, reach, scoring)
    return heads.contiguous(), None  # as the original's are, which some models rely on


def _attend(
    layer: FarReads, call: _Call, original: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor,
    seen: Visibility, reach: _Reach, scoring: Scoring,
) -> Tensor:  # fmt: skip
    """Outputs of the heads, (B, T, H, D); the correction is left on the call for the hook at the output projection.

    Args:
        layer: the patch.
        call: the call of its attention module.
        original: the unpatched attention on the same arguments.
        query: queries of the newest tokens, (B, H, T, D).
        key: all keys written so far, (B, H / G, S, D).
        value: all values written so far, (B, H / G, S, D).
        seen: which keys are visible.
        reach: which tokens have far keys.
        scoring: maps products of queries and keys to scores.
    """
    n_keys, far, n_far, causal_pairs = reach
    n_batch, n_tokens = far.shape
    counts = Counts(tokens=n_batch * n_tokens, causal_pairs=causal_pairs)
    if call.answering == "full":
        return original()
    if not n_far or layer.reads_all:  # the original costs no more, and is exact
        counts.far_tokens = counts.far_reads = n_far
        counts.window_pairs = causal_pairs
        heads, decision = original(), None
    else:
        near = window_read(query, key, value, window=layer.window, n_sinks=layer.n_sinks, scoring=scoring, seen=seen)
        if call.answering == "near":
            return near.heads
        start = key.shape[2] - n_tokens
        sight = Seen(call.hidden, near.heads, near.masses, far, n_keys, start, original, call.again)
        # A module that attends twice in one call reads for the same tokens (DiffLlama).
        decision = call.decision if call.decided else checked(layer.decide(sight), layer, sight)
        counts.far_tokens, counts.window_pairs = n_far, near.n_scored
        heads = near.heads
        if decision is None:
            heads, counts.far_reads = sight.full, n_far
        elif (reads := decision[0]).is_floating_point():
            by_head = reads.view(*far.shape, -1)  # (B, T, H or 1)
            weight = torch.where(far[..., None], by_head, 1.0)[..., None]
            heads = heads + weight * (sight.full - heads)
            counts.far_reads = (by_head.detach().double().mean(-1) * far).sum()  # stays where it is, so nothing waits
        elif reads.ndim == 3:
            reads = reads & far[..., None]
            counts.far_reads = float(reads.double().mean(-1).sum())
            heads, counts.far_pairs = read_by_heads(heads, query, key, value, reads, scoring=scoring, seen=seen)
        else:
            reads = reads if n_far == far.numel() else reads & far
            counts.far_reads = int(reads.sum())
            if counts.far_reads:
                answers, counts.far_pairs = far_read(query, key, value, reads, scoring=scoring, seen=seen)
                heads = heads.index_put(reads.nonzero(as_tuple=True), answers)
        if isinstance(seen, Mask) and not bool(seen.own.all()):
            heads = torch.where(seen.own[..., None, None], heads, sight.full)
        if layer.never_reads:
            counts.unreachable = n_far  # each of these tokens pushes one key out of the window
    if not call.decided:
        layer.tally.add(counts)
        call.decided, call.decision = True, decision
        all_skip = not counts.far_reads and n_far == far.numel()
        call.correction = None if decision is None else correction(far, *decision, all_skip=all_skip)
    return heads


register(NAMES, _attention)
