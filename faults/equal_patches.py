"""Patched models: closed or reading all they are the original, under every mask; caches and packing do not matter."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from cramlab.consolidation.patch.install import closed, remove
from faults.cases import Case, Fault, FaultFoundError, NotHereError
from faults.equal import case, pieces, same
from faults.equal_models import batch, cached, chunks, future, generate, logits, others, packed, padding, refusable
from faults.models import FAMILIES, INF, N_SINKS, WINDOW, is_refusal, original, patched, tokens

CACHES = ("dynamic", "static", "offloaded", "offloaded static", "quantized")


def cases(seed: int, share: float) -> Iterator[Case]:
    """Every family, with several weights."""
    for family in FAMILIES[:: 1 if share == 1 else 9]:
        for number in range(max(1, round(2 * share))):
            for test, check in CHECKS.items():
                yield case(
                    f"patched models: {test}", f"{family}: {test} #{number}", check, family, 1000 * seed + number
                )
            for cache in CACHES:
                yield case("patched models: caches", f"{family}: {cache} cache #{number}", _caches, family,
                           1000 * seed + number, cache)  # fmt: skip


THRESHOLDS = {"all read": -INF, "some read": 0.0, "none reads": INF}


def _with_patches(check: Callable[[Any, int], None]) -> Callable[[str, int], None]:
    """The check on a model in which all, some and no tokens read."""

    def checked(family: str, seed: int) -> None:
        for threshold in THRESHOLDS.values():
            check(patched(family, threshold, seed), seed)

    return checked


def masks(n: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Masks that unpatched models honour, for two rows of n tokens."""
    rng = random.Random(seed)
    ones, causal = torch.ones(2, n, dtype=torch.int64), torch.ones(n, n).tril().bool()
    left, right, holes, first = (ones.clone() for _ in range(4))
    left[0, : rng.randint(1, 9)] = 0
    right[1, -rng.randint(1, 9) :] = 0
    for place in rng.sample(range(1, n - 1), 6):
        holes[:, place] = 0
    first[0, 0] = first[1, 1] = 0
    blocks = causal.clone()
    cut = rng.randint(8, n - 8)
    blocks[cut:, :cut] = False
    stretch = causal.clone()
    stretch[n - 12 : n - 4, 1 : n // 2] = False
    found = {"none": {}, "ones": {"attention_mask": ones}}
    found |= {name: {"attention_mask": mask} for name, mask in (
        ("left padding", left), ("right padding", right), ("holes", holes), ("a hole among the first keys", first),
        ("bool", left.bool()),
    )}  # fmt: skip
    for name, square in (("causal", causal), ("blocks", blocks), ("a stretch that sees less", stretch)):
        wide = square[None, None].expand(2, 1, n, n)
        found[f"4-D bool, {name}"] = {"attention_mask": wide}
        lowest = torch.finfo(torch.float32).min
        found[f"4-D float, {name}"] = {"attention_mask": torch.where(wide, 0.0, lowest)}
    return found


def _visible(given: dict[str, Tensor], n: int) -> Tensor:
    """Tokens that are no padding themselves, (B, T): only their outputs mean anything."""
    mask = given.get("attention_mask")
    return torch.ones(2, n, dtype=torch.bool) if mask is None or mask.ndim == 4 else mask.bool()


def _open_is_original(family: str, seed: int) -> None:
    n, refused = 40, []
    ids, model = tokens(2, n, seed), patched(family, -INF, seed)
    plain = original(family, seed)
    for name, given in masks(n, seed).items():
        seen, wanted = _visible(given, n), logits(plain, ids, **given)
        try:
            found = logits(model, ids, **given)
        except Exception as error:
            if not is_refusal(error):
                raise
            refused.append(name)
            continue
        same(found[seen], wanted[seen], 2e-4, f"all read, mask: {name}")
    if len(refused) == len(masks(n, seed)):
        raise FaultFoundError(Fault.UNCLEAR, "every mask was refused")


def _none_is_window(family: str, seed: int) -> None:
    """Silent adapters and no reads: the original under a mask of window and first keys."""
    if family == "qwen2 sliding":
        raise NotHereError("its other layers have a window of their own")
    n = 40
    ids, model, plain = tokens(2, n, seed), patched(family, INF, seed, silent=True), original(family, seed)
    key, query = torch.arange(n)[None], torch.arange(n)[:, None]
    near = (key <= query) & ((key > query - WINDOW) | (key < N_SINKS))
    for n_padding in (0, 5):
        mask = torch.ones(2, n, dtype=torch.int64)
        mask[:, :n_padding] = 0
        start = key - n_padding
        band = (key >= n_padding) & (key <= query) & ((key > query - WINDOW) | (start < N_SINKS)) if n_padding else near
        wanted = logits(
            plain, ids[:, n_padding:], attention_mask=band[n_padding:, n_padding:][None, None].expand(2, 1, -1, -1)
        )
        found = logits(model, ids, attention_mask=mask)[:, n_padding:]
        if family == "gpt2" and n_padding:
            continue  # its positions count padding unless they are given
        same(found, wanted, 2e-4, f"window alone, {n_padding} of padding")


def _closed_is_original(family: str, seed: int) -> None:
    n = 40
    for dtype in (torch.float32, torch.bfloat16):
        ids, plain = tokens(2, n, seed), original(family, seed, dtype)
        wanted = {name: logits(plain, ids, **given) for name, given in masks(n, seed).items()
                  if dtype == torch.float32 or "float" not in name}  # fmt: skip
        model = patched(family, 0.0, seed, dtype)
        for name, given in masks(n, seed).items():
            if name in wanted:
                with closed(model):
                    same(logits(model, ids, **given), wanted[name], 0.0, f"closed, {dtype}, mask: {name}")
        remove(model)
        same(logits(model, ids), wanted["none"], 0.0, f"removed, {dtype}")


def _hidden_tokens(family: str, seed: int) -> None:
    """What a mask hides may be anything."""
    n = 40
    ids, model, plain = tokens(2, n, seed), patched(family, 0.0, seed), original(family, seed)
    for name, given in masks(n, seed).items():
        mask = given.get("attention_mask")
        if mask is None or mask.ndim != 2:
            continue
        other = torch.where(mask.bool(), ids, (ids + 11) % 50 + 2)
        seen = mask.bool()
        same(logits(plain, other, **given)[seen], logits(plain, ids, **given)[seen], 1e-5, f"the original, {name}")
        try:
            found, wanted = logits(model, other, **given), logits(model, ids, **given)
        except Exception as error:
            if not is_refusal(error):
                raise
            continue
        same(found[seen], wanted[seen], 1e-5, f"other hidden tokens, mask: {name}")


def _leaks_in_bf16(family: str, seed: int) -> None:
    """The same sums on both sides: a token that matters would be seen however coarse the numbers are."""
    model, ids = patched(family, INF, seed, torch.bfloat16), tokens(2, 36, seed)
    cut = random.Random(seed).randint(10, 35)
    other = ids.clone()
    other[:, cut:] = (ids[:, cut:] + 7) % 50 + 2
    other[1] = (ids[1] + 3) % 50 + 2
    same(logits(model, other)[0, :cut], logits(model, ids)[0, :cut], 0.0, "bfloat16, future and other sequence")


def _cache(kind: str, model: Any, n: int) -> Any:
    match kind:
        case "dynamic":
            return cache_utils.DynamicCache(config=model.config)
        case "static":
            return cache_utils.StaticCache(config=model.config, max_cache_len=n)
        case "offloaded":
            return cache_utils.DynamicCache(config=model.config, offloading=True)
        case "offloaded static":
            return cache_utils.StaticCache(config=model.config, max_cache_len=n, offloading=True)
        case _:
            return cache_utils.QuantizedCache(backend="quanto", config=model.config)


def _caches(family: str, seed: int, kind: str) -> None:
    """A cache that the original works with, with the patch: piece by piece, and by `generate`."""
    n, rng = 36, random.Random(seed)
    lengths = [13, *pieces(n - 13, rng)]
    ids = tokens(2, n, seed)

    def parts(model: Any) -> Tensor:
        cache, found = _cache(kind, model, n), []
        for part in ids.split(lengths, dim=1):
            found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1)

    plain = original(family, seed)
    tolerance = 2e-4 if kind != "quantized" else 0.1
    try:
        same(parts(plain), logits(plain, ids), tolerance, f"the original with a {kind} cache")
    except (Exception, FaultFoundError) as error:
        raise NotHereError(f"the original does not work with a {kind} cache here: {error}") from error
    for name, threshold in THRESHOLDS.items():
        model = patched(family, threshold, seed)
        found = refusable(functools.partial(parts, model))
        same(found, logits(model, ids), tolerance, f"{name}, {kind} cache, in {len(lengths)} calls")
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
        if kind in ("static", "offloaded", "offloaded static"):
            implementation = kind.replace("offloaded static", "offloaded_static")
            wanted = model.generate(ids, **options)
            generated = model.generate(ids, cache_implementation=implementation, **options)
            if not torch.equal(generated, wanted):
                raise FaultFoundError(Fault.WRONG, f"{name}: generate with a {kind} cache gives other tokens")


CHECKS: dict[str, Callable[[str, int], None]] = {
    "all read is the original, under every mask": _open_is_original,
    "none reads is the window, under every padding": _none_is_window,
    "closed or removed is the original, bit by bit": _closed_is_original,
    "what a mask hides does not matter": _hidden_tokens,
    "bfloat16: no leak, bit by bit": _leaks_in_bf16,
    "padding on the right": _with_patches(padding("right")),
    "batch of one against many": _with_patches(batch),
    "with a cache against without": _with_patches(cached),
    "prefill in pieces against one pass": _with_patches(chunks),
    "future tokens do not matter": _with_patches(future),
    "other sequences do not matter": _with_patches(others),
    "packed by position_ids against alone": _with_patches(packed("position_ids")),
    "generate against whole passes": _with_patches(generate),
}
