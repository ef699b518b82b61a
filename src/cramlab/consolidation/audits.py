"""Audits of a patched model: skipped reads that are made anyway, to see what skipping them changed.

An audit runs the model once more where the patch is closed, in the calling thread alone: a document from its start, or
one token after the cache of the tokens before it. The pass that it audits, its cache and its output stay as they are.
The reads are added to the counts of the patch.

Source: ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from cramlab.consolidation.measure import next_losses
from cramlab.consolidation.patch.attach import closed, installed
from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.patch.growing_cache import GrowingLayer

# Arguments of a pass that an audit passes on, and arguments that make no difference to the logits of a row.
_BY_ROW = ("attention_mask", "position_ids", "token_type_ids")
_IGNORED = frozenset({
    "input_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep", "labels", "cache_position",
    "output_attentions", "output_hidden_states", *_BY_ROW,
})  # fmt: skip


class Pass(NamedTuple):
    """A forward pass that has ended.

    Attributes:
        tokens: token ids, (B, T).
        logits: (B, T, V).
        start: number of tokens in the cache before the pass.
        cache: the cache after the pass, whose layers hold start + T keys; None: there is none.
        by_row: other arguments, with one row for each sequence, or one row for all.
    """

    tokens: Tensor
    logits: Tensor
    start: int
    cache: Cache | None
    by_row: dict[str, Tensor]

    def row(self, b: int) -> dict[str, Tensor]:
        """The arguments of one sequence."""
        return {name: value[b : b + 1] if len(value) > 1 else value for name, value in self.by_row.items()}


def arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of a pass by name."""
    if not args:
        return kwargs
    given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    return given | given.pop("kwargs", {})


def n_cached(given: Mapping[str, Any]) -> int:
    """Number of tokens that were in the cache before a pass that has ended; 0 without a cache of transformers."""
    cache, tokens = given.get("past_key_values"), given.get("input_ids")
    if not isinstance(cache, Cache) or tokens is None:
        return 0
    return int(cache.get_seq_length()) - tokens.shape[1]


def seen_pass(given: Mapping[str, Any], output: Any) -> Pass | None:
    """The pass behind an output; None when it cannot be audited.

    That is so for inputs that are not token ids, several tokens after a cache, logits of some positions alone, masks of
    four dimensions, caches that are no plain `DynamicCache`, and arguments that an audit does not know.

    Args:
        given: from `arguments`.
        output: what the model returned.
    """
    given = {name: value for name, value in given.items() if value is not None and name != "self"}
    tokens, logits, cache = given.get("input_ids"), getattr(output, "logits", None), given.get("past_key_values")
    if not isinstance(tokens, Tensor) or not isinstance(logits, Tensor) or given.keys() - _IGNORED:
        return None
    if logits.shape[:2] != tokens.shape or any(given[n].ndim != 2 for n in _BY_ROW if n in given):
        return None
    if cache is not None and not (
        isinstance(cache, Cache) and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)
    ):
        return None
    start = n_cached(given)
    if start > 0 and tokens.shape[1] > 1:
        return None
    return Pass(tokens, logits, start, cache, {name: given[name] for name in _BY_ROW if name in given})


@torch.no_grad()
def document_increase(model: nn.Module, seen: Pass, b: int) -> float:
    """What skipping cost a document, nats per token: its loss in the pass minus that of the original model.

    Args:
        model: the patched model.
        seen: a pass from an empty cache.
        b: number of the sequence, of which at least two tokens are not padding.
    """
    row = seen.row(b)
    with closed(model):
        original = model(input_ids=seen.tokens[b : b + 1], use_cache=False, **row).logits[0]
    real = _real(seen, b)
    losses = [next_losses(logits[real], seen.tokens[b][real]).double().mean() for logits in (seen.logits[b], original)]
    _pay(model, n_keys=torch.arange(1, int(real.sum()) + 1))
    return float(losses[0] - losses[1])


@torch.no_grad()
def token_change(model: nn.Module, seen: Pass, b: int, t: int = 0) -> float:
    """What the skipped reads of one token would have changed in its next-token distribution, nats.

    That is the Kullback-Leibler divergence of the distribution without them from the one with them. Earlier tokens stay
    as they were, so it leaves out what their skipped reads have changed in the cache.

    Args:
        model: the patched model.
        seen: a pass with a cache.
        b: number of the sequence.
        t: number of the token in the pass.
    """
    assert seen.cache is not None
    n = seen.start + t
    before = DynamicCache()
    for i, layer in enumerate(seen.cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        before.update(layer.keys[b : b + 1, :, :n], layer.values[b : b + 1, :, :n], i)
    row = {
        name: value[:, : n + 1] if name == "attention_mask" else value[:, t : t + 1]
        for name, value in seen.row(b).items()
    }
    with closed(model):
        reads = model(input_ids=seen.tokens[b : b + 1, t : t + 1], past_key_values=before, use_cache=True, **row)
    with_reads, without = reads.logits[0, -1].double().log_softmax(-1), seen.logits[b, t].double().log_softmax(-1)
    mask = seen.row(b).get("attention_mask")
    _pay(model, n_keys=torch.tensor([n + 1 if mask is None else int(mask[0, : n + 1].sum())]))
    return float((with_reads.exp() * (with_reads - without)).sum().clamp(min=0))


def n_far_keys(model: nn.Module, seen: Pass, b: int, t: int = 0) -> int:
    """Number of keys of a token that are beyond the window and the first keys of the layer with the shortest window."""
    mask = seen.row(b).get("attention_mask")
    n = seen.start + t + 1
    n_keys = n if mask is None else int(mask[0, :n].sum()) * int(mask[0, n - 1] != 0)
    return max(0, n_keys - min(layer.window + layer.n_sinks for layer in installed(model).values()))


def n_real(seen: Pass, b: int) -> int:
    """Number of tokens of a sequence that are not padding."""
    return int(_real(seen, b).sum())


def _real(seen: Pass, b: int) -> Tensor:
    """Which tokens of a sequence of the pass are not padding, bool (T,)."""
    mask = seen.row(b).get("attention_mask")
    if mask is None:
        return torch.ones_like(seen.tokens[b], dtype=torch.bool)
    return mask[0, seen.start :].to(seen.tokens.device) != 0


def _pay(model: nn.Module, *, n_keys: Tensor) -> None:
    """Adds the reads of an audit to the counts of every layer, for tokens that see as many keys, (N,)."""
    for layer in installed(model).values():
        far = n_keys > layer.window + layer.n_sinks
        layer.tally.add(Counts(audit_reads=int(far.sum()), audit_pairs=int(n_keys.sum())))


@torch.no_grad()
def changes_of(
    model: nn.Module, documents: Sequence[Tensor], *, tokens_per_document: int, cap: float, seed: int
) -> list[float]:
    """Mean of `token_change`, capped, over some far tokens of each document, nats; no reads are counted.

    Args:
        model: the patched model.
        documents: token ids, (T,) each; those in which nothing is far are left out.
        tokens_per_document: number of audited tokens of a document, drawn without replacement.
        cap: largest change that counts, nats.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    near = min(layer.window + layer.n_sinks for layer in installed(model).values())
    counts = {layer: layer.counts for layer in installed(model).values()}
    found = []
    for tokens in documents:
        if len(tokens) <= near:
            continue
        output = model(input_ids=tokens[None], past_key_values=DynamicCache(), use_cache=True)
        seen = Pass(tokens[None], output.logits, 0, output.past_key_values, {})
        places = near + torch.randperm(len(tokens) - near, generator=generator)[:tokens_per_document]
        changes = [min(cap, token_change(model, seen, 0, int(t))) for t in places]
        found.append(sum(changes) / len(changes))
    for layer, before in counts.items():
        layer.tally.reset()
        layer.tally.add(before)
    return found
