"""What a consolidated model costs beside the original on this machine: pairs, bytes and time, for a prompt and a token.

Source: ours.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.install import patched
from cramlab.timing import side_by_side, wall_ms

_TOKENS = 24  # decoded tokens that are timed, at most
_SECONDS = 10.0  # for the timed prompts, about
_PROMPTS = 3, 9  # fewest and most timed prompts
ORIGINAL, CONSOLIDATED = "original", "consolidated"


def costs(model: nn.Module, layers: Mapping[int, FarReads], tokens: Tensor) -> dict[str, Any]:
    """Times a prompt and the tokens that follow it, both models in turns, and counts pairs and bytes.

    The tokens after the prompt are those of the document, so both models decode the same text. For each call the patch
    is installed or removed first, outside of the time: the original is the model as it was, with a cache of its own.

    Args:
        model: a causal language model without a patch.
        layers: patches by index of the block, not installed.
        tokens: a document, (T,), of at least 8 tokens.

    Returns:
        "prompt" and "decode", each with the number of tokens, and by model the `timing.side_by_side` row, "pairs"
        (query and key, per head, summed over the patched layers; per token when decoding) and bytes of keys and values
        that these touch; "bytes": sizes of weights, patch and caches.
    """
    n_decoded = min(_TOKENS, len(tokens) // 4)
    prompt, rest = tokens[None, : len(tokens) - n_decoded], tokens[len(tokens) - n_decoded :]
    clock = wall_ms(tokens.device)

    def around(way: str) -> contextlib.AbstractContextManager[Any]:
        return patched(model, layers) if way == CONSOLIDATED else contextlib.nullcontext()

    steps = {way: Decoding(model, rest) for way in (ORIGINAL, CONSOLIDATED)}
    _reset(layers)
    start = time.perf_counter()
    for way, step in steps.items():
        with around(way):
            step.begin(prompt)
    once = max((time.perf_counter() - start) / 2, 1e-3)
    counts = {i: layer.counts for i, layer in layers.items()}
    prompts = side_by_side(
        {way: functools.partial(prefilled, model, prompt) for way in steps},
        repeats=max(_PROMPTS[0], min(_PROMPTS[1], int(_SECONDS / (2 * once)))), warmups=0, clock=clock, around=around,
    )  # fmt: skip
    _reset(layers)
    warmups = min(2, n_decoded - 1)  # a first step makes room in the cache
    decode = side_by_side(steps, repeats=n_decoded - warmups, warmups=warmups, clock=clock, around=around)
    decoded = {i: layer.counts for i, layer in layers.items()}
    last = len(steps[ORIGINAL].cache.layers) - 1  # later layers share what earlier ones have written
    key_bytes = _key_bytes(steps[ORIGINAL].cache)

    def row(timed: Mapping[str, Any], counted: Mapping[int, Counts], n_calls: int) -> dict[str, Any]:
        pairs = {
            ORIGINAL: {i: c.causal_pairs / n_calls for i, c in counted.items()},
            CONSOLIDATED: {i: (c.window_pairs + c.far_pairs) / n_calls for i, c in counted.items()},
        }
        return {
            way: timed[way] | {"pairs": sum(pairs[way].values()),
                               "key_bytes": sum(n * key_bytes[min(i, last)] for i, n in pairs[way].items())}
            for way in steps
        }  # fmt: skip

    return {
        "prompt": {"tokens": prompt.shape[1]} | row(prompts, counts, 1),
        "decode": {"tokens": n_decoded, "after": prompt.shape[1]} | row(decode, decoded, n_decoded),
        "bytes": {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "patch": sum(t.numel() * t.element_size() for layer in layers.values()
                         for t in (*layer.parameters(), *layer.buffers())),
            "cache": {way: _allocated(step.cache) for way, step in steps.items()},
        },
    }  # fmt: skip


def _reset(layers: Mapping[int, FarReads]) -> None:
    for layer in layers.values():
        layer.tally.reset()


def prefilled(model: nn.Module, prompt: Tensor) -> tuple[DynamicCache, Tensor]:
    """The cache of a prompt (1, T) and logits (1, T or 1, V); the last alone where the model allows it."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=prompt, use_cache=True, **few)  # which makes the cache that its family needs
    return output.past_key_values, output.logits


class Decoding:
    """One more given token at every call.

    Args:
        model: the model that decodes.
        tokens: the tokens after the prompt, (N,).
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens, self.done = model, tokens, 0
        self.cache = DynamicCache()

    def begin(self, prompt: Tensor) -> None:
        """Fills the cache with a prompt (1, T)."""
        self.cache, _ = prefilled(self.model, prompt)

    def __call__(self) -> None:
        """The next token."""
        token = self.tokens[self.done : self.done + 1][None]
        self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
        self.done += 1


def _key_bytes(cache: DynamicCache) -> list[int]:
    """Bytes of one position's key and value, for each layer of a cache."""
    return [sum(e.shape[1] * e.shape[3] * e.element_size() for e in _entries(layer)) for layer in cache.layers]


def _allocated(cache: DynamicCache) -> int:
    """Bytes of a cache's storage, room for later tokens included."""
    return sum(e.untyped_storage().nbytes() for layer in cache.layers for e in _entries(layer))


def _entries(layer: Any) -> list[Tensor]:
    """Keys and values of a layer of a cache; none where it keeps a recurrent state instead."""
    return [e for e in (getattr(layer, "keys", None), getattr(layer, "values", None)) if e is not None]
