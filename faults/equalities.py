"""Equalities: what must not matter, does not. Padding, batch, cache, step and packing change nothing; nothing leaks.

Layers and language models of ours are compared in float64, where rounding hides nothing; patched models in float32,
and in bfloat16 where both sides do the same sums. A computation that the library refuses in words holds too.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cramlab.hf.consolidated import closed, remove
from cramlab.mixer import Routing
from faults.cases import Case, Fault, FaultFoundError, NotHereError, RefusedError
from faults.models import (
    D_MODEL,
    FAMILIES,
    INF,
    N_SINKS,
    WINDOW,
    families,
    is_refusal,
    language_model,
    mixer,
    mixers,
    original,
    patched,
    tokens,
)

LANGUAGE_MODELS = ("roomy", "small", "salience", "hybrid", "unbounded", "recurrent")
CACHES = ("dynamic", "static", "offloaded", "offloaded static", "quantized")


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """Layers, language models of ours, and patched models."""
    n_seeds = max(1, round(4 * share))
    for name in list(mixers())[:: 1 if share == 1 else 7]:
        for number in range(n_seeds):
            for test, check in LAYER_CHECKS.items():
                yield _case(f"layers: {test}", f"{name}: {test} #{number}", check, name, _seed(seed, number))
    for kind in LANGUAGE_MODELS[:: 1 if share == 1 else 3]:
        for number in range(n_seeds):
            for test, check in MODEL_CHECKS.items():
                yield _case(f"CRAM language models: {test}", f"{kind}: {test} #{number}", check, kind,
                            _seed(seed, number))  # fmt: skip
    for number in range(n_seeds):
        for test, check in CRAM_GPT2_CHECKS.items():
            yield _case(f"GPT-2 with CRAM layers: {test}", f"cram_gpt2: {test} #{number}", check, _seed(seed, number))
    for family in FAMILIES[:: 1 if share == 1 else 4]:
        for number in range(max(1, round(2 * share))):
            for test, check in PATCH_CHECKS.items():
                yield _case(f"patched models: {test}", f"{family}: {test} #{number}", check, family,
                            _seed(seed, number))  # fmt: skip
            for cache in CACHES:
                yield _case("patched models: caches", f"{family}: {cache} cache #{number}", _caches, family,
                            _seed(seed, number), cache)  # fmt: skip


def _seed(seed: int, number: int) -> int:
    return 1000 * seed + number


def _case(test: str, name: str, check: Callable[..., None], *given: Any) -> Case:
    def tried() -> None:
        with torch.no_grad():
            check(*given)

    return Case(test, name, tried)


def same(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raises unless two tensors are equal within a share of the larger one's scale; 0: bit by bit."""
    if found.shape != wanted.shape:
        raise FaultFoundError(Fault.WRONG, f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if bool(torch.equal(found, wanted)):
        return
    off = float((found.double() - wanted.double()).abs().max())
    scale = max(1.0, float(wanted.double().abs().max()))
    if not off <= tolerance * scale:
        raise FaultFoundError(Fault.WRONG, f"{what}: off by {off:.3g} at a scale of {scale:.3g}")


def pieces(n: int, rng: random.Random) -> list[int]:
    """Lengths of consecutive parts that make n, some of them a single token."""
    found: list[int] = []
    while (left := n - sum(found)) > 0:
        found.append(min(left, rng.choice((1, 1, 2, 3, 5, 9))))
    return found


# Layers: a mixer, alone.

EXACT = 1e-9


def _sequence(n_batch: int, n_tokens: int, seed: int) -> tuple[Tensor, Tensor, Routing]:
    """Random inputs, gaps and reads of an oracle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_batch, n_tokens, D_MODEL, generator=generator, dtype=torch.float64)
    gaps = 3 * torch.rand(n_batch, n_tokens, generator=generator, dtype=torch.float64)
    return x, gaps, Routing(oracle_reads=torch.rand(n_batch, n_tokens, generator=generator) < 0.3)


def _some(routing: Routing, *index: Any) -> Routing:
    """The routing of some tokens."""
    assert routing.oracle_reads is not None
    return routing._replace(oracle_reads=routing.oracle_reads[index])


def _layer_padding(side: str) -> Callable[[str, int], None]:
    def check(name: str, seed: int) -> None:
        rng = random.Random(seed)
        n, padding = rng.randint(8, 40), rng.randint(1, 9)
        layer, (x, gaps, routing) = mixer(name, seed), _sequence(2, n, seed)
        wanted = layer(x, gaps, routing=routing).y
        whole = n + padding
        at = slice(padding, whole) if side == "left" else slice(0, n)
        wide_x, wide_gaps = torch.full((2, whole, D_MODEL), torch.nan).double(), torch.full((2, whole), -1.0).double()
        valid, oracle = torch.zeros(2, whole, dtype=torch.bool), torch.ones(2, whole, dtype=torch.bool)
        wide_x[:, at], wide_gaps[:, at], valid[:, at] = x, gaps, True
        oracle[:, at] = routing.oracle_reads
        found = layer(wide_x, wide_gaps, valid=valid, routing=Routing(oracle_reads=oracle))
        same(found.y[:, at], wanted, EXACT, f"padding on the {side}")

    return check


def _layer_batch(name: str, seed: int) -> None:
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(5, 24, seed)
    together = layer(x, gaps, routing=routing).y
    for row in range(5):
        at = slice(row, row + 1)
        same(layer(x[at], gaps[at], routing=_some(routing, at)).y, together[at], EXACT, f"row {row} alone")


def _layer_steps(name: str, seed: int) -> None:
    _layer_parts(name, seed, [1] * 24)


def _layer_chunks(name: str, seed: int) -> None:
    _layer_parts(name, seed, pieces(40, random.Random(seed)))


def _layer_parts(name: str, seed: int, lengths: list[int]) -> None:
    n = sum(lengths)
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(2, n, seed)
    wanted, state, found, start = layer(x, gaps, routing=routing).y, None, [], 0
    for length in lengths:
        at = slice(start, start + length)
        output = layer(x[:, at], gaps[:, at], state, routing=_some(routing, slice(None), at))
        state, start = output.state, start + length
        found.append(output.y)
    same(torch.cat(found, dim=1), wanted, EXACT, f"in {len(lengths)} calls")


def _layer_future(name: str, seed: int) -> None:
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(2, 30, seed)
    cut = random.Random(seed).randint(1, 29)
    other_x, other_gaps = x.clone(), gaps.clone()
    other_x[:, cut:], other_gaps[:, cut:] = -2 * x[:, cut:] + 1, 7.0
    found = layer(other_x, other_gaps, routing=routing).y[:, :cut]
    same(found, layer(x, gaps, routing=routing).y[:, :cut], EXACT, f"tokens from {cut} on are others")


def _layer_others(name: str, seed: int) -> None:
    layer, (x, gaps, routing) = mixer(name, seed), _sequence(3, 30, seed)
    other_x, other_gaps = x.clone(), gaps.clone()
    other_x[1:], other_gaps[1:] = 5 * x[1:] - 3, 0.1
    found = layer(other_x, other_gaps, routing=routing).y[:1]
    same(found, layer(x, gaps, routing=routing).y[:1], EXACT, "the other sequences are others")


LAYER_CHECKS: dict[str, Callable[[str, int], None]] = {
    "padding on the left": _layer_padding("left"),
    "padding on the right": _layer_padding("right"),
    "batch of one against many": _layer_batch,
    "step by step against one pass": _layer_steps,
    "in pieces against one pass": _layer_chunks,
    "future tokens do not matter": _layer_future,
    "other sequences do not matter": _layer_others,
}


# CRAM language models.


def _logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    return model(input_ids=ids, **given).logits


def _refusable(call: Callable[[], Tensor]) -> Tensor:
    """What a call returns; a refusal in words is right too."""
    try:
        return call()
    except Exception as error:
        if is_refusal(error):
            raise RefusedError(str(error)) from error
        raise


def _model_padding(side: str) -> Callable[[Any, int], None]:
    def check(model: Any, seed: int) -> None:
        lengths = [random.Random(seed + row).randint(6, 24) for row in range(3)]
        longest = max(lengths) + 2
        ids, mask = tokens(3, longest, seed), torch.zeros(3, longest, dtype=torch.int64)
        for row, length in enumerate(lengths):
            mask[row, longest - length if side == "left" else 0 : longest if side == "left" else length] = 1
        together = _refusable(lambda: _logits(model, ids, attention_mask=mask))
        for row in range(3):
            alone = _logits(model, ids[row][mask[row].bool()][None])[0]
            same(together[row][mask[row].bool()], alone, _tolerance(model), f"row {row} with padding on the {side}")

    return check


def _tolerance(model: Any) -> float:
    return EXACT if next(model.parameters()).dtype == torch.float64 else 2e-4


def _model_batch(model: Any, seed: int) -> None:
    ids = tokens(4, 25, seed)
    together = _logits(model, ids)
    for row in range(4):
        same(_logits(model, ids[row : row + 1])[0], together[row], _tolerance(model), f"row {row} alone")


def _model_cached(model: Any, seed: int) -> None:
    _model_parts(model, seed, [5] + [1] * 20)


def _model_chunks(model: Any, seed: int) -> None:
    _model_parts(model, seed, pieces(40, random.Random(seed)))


def _model_parts(model: Any, seed: int, lengths: list[int]) -> None:
    ids = tokens(2, sum(lengths), seed)
    wanted, cache, found = _logits(model, ids), None, []
    for part in ids.split(lengths, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    same(torch.cat(found, dim=1), wanted, _tolerance(model), f"in {len(lengths)} calls")


def _model_padded_steps(model: Any, seed: int) -> None:
    """A padded prompt, then tokens one by one, as `generate` does it."""
    ids, mask = tokens(3, 24, seed), torch.ones(3, 24, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 7)):
        mask[row, :padding] = 0
    cache, found = None, []
    for start, end in [(0, 12), *((t, t + 1) for t in range(12, 24))]:
        output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    together = torch.cat(found, dim=1)
    for row, padding in enumerate((0, 3, 7)):
        alone = _logits(model, ids[row : row + 1, padding:])[0]
        same(together[row, padding:], alone, _tolerance(model), f"row {row} with {padding} of padding, with a cache")


def _model_future(model: Any, seed: int) -> None:
    ids = tokens(2, 30, seed)
    cut = random.Random(seed).randint(1, 29)
    other = ids.clone()
    other[:, cut:] = (ids[:, cut:] + 7) % 50 + 2
    same(_logits(model, other)[:, :cut], _logits(model, ids)[:, :cut], _tolerance(model), f"others from {cut} on")


def _model_others(model: Any, seed: int) -> None:
    ids = tokens(3, 30, seed)
    other = torch.cat([ids[:1], tokens(2, 30, seed + 1)])
    same(_logits(model, other)[:1], _logits(model, ids)[:1], _tolerance(model), "the other sequences are others")


def _model_packed(how: str) -> Callable[[Any, int], None]:
    def check(model: Any, seed: int) -> None:
        lengths = [random.Random(seed + row).randint(5, 16) for row in range(3)]
        ids = [tokens(1, length, seed + row) for row, length in enumerate(lengths)]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        given = {
            "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
            "seq_idx": {"seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()},
            "cu_seq_lens": {
                "cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int(),
                "max_length_q": max(lengths), "max_length_k": max(lengths),
            },
        }[how]  # fmt: skip
        together = _refusable(lambda: _logits(model, torch.cat(ids, dim=1), use_cache=False, **given))
        for row, part in enumerate(together.split(lengths, dim=1)):
            same(part, _logits(model, ids[row]), _tolerance(model), f"document {row} of a row packed by {how}")

    return check


def _model_last(model: Any, seed: int) -> None:
    ids = tokens(2, 20, seed)
    wanted = _logits(model, ids)
    same(_logits(model, ids, logits_to_keep=3), wanted[:, -3:], _tolerance(model), "the last three")
    at = torch.tensor([0, 7, 19])
    found = _refusable(lambda: _logits(model, ids, logits_to_keep=at))
    same(found, wanted[:, at], _tolerance(model), "three by a tensor")


def _model_generate(model: Any, seed: int) -> None:
    """Greedy generation with a cache against greedy by whole passes."""
    ids = tokens(2, 9, seed)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for _ in range(12):
        ids = torch.cat([ids, _logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    if not torch.equal(found, ids):
        raise FaultFoundError(Fault.WRONG, "generate gives other tokens than whole passes")


def _model_copies(model: Any, seed: int) -> None:
    ids = tokens(1, 20, seed)
    same(_logits(copy.deepcopy(model), ids), _logits(model, ids), 0.0, "a deep copy")


Check = Callable[[Any, int], None]
BOTH: dict[str, Check] = {
    "padding on the left": _model_padding("left"),
    "padding on the right": _model_padding("right"),
    "batch of one against many": _model_batch,
    "future tokens do not matter": _model_future,
    "other sequences do not matter": _model_others,
    "packed by position_ids against alone": _model_packed("position_ids"),
}
WITH_CACHE: dict[str, Check] = {
    "with a cache against without": _model_cached,
    "prefill in pieces against one pass": _model_chunks,
    "padded prompt with a cache": _model_padded_steps,
    "packed by seq_idx against alone": _model_packed("seq_idx"),
    "packed by cu_seq_lens against alone": _model_packed("cu_seq_lens"),
    "logits of some tokens": _model_last,
    "generate against whole passes": _model_generate,
    "a deep copy": _model_copies,
}


def _ours(check: Check) -> Callable[[str, int], None]:
    return lambda kind, seed: check(language_model(kind, seed), seed)


def _cram_gpt2(check: Check) -> Callable[[int], None]:
    def checked(seed: int) -> None:
        torch.manual_seed(seed)
        check(families().build("cram_gpt2"), seed)

    return checked


MODEL_CHECKS = {name: _ours(check) for name, check in (BOTH | WITH_CACHE).items()}
CRAM_GPT2_CHECKS = {name: _cram_gpt2(check) for name, check in BOTH.items()}


# Patched models.

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
        seen, wanted = _visible(given, n), _logits(plain, ids, **given)
        try:
            found = _logits(model, ids, **given)
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
    for padding in (0, 5):
        mask = torch.ones(2, n, dtype=torch.int64)
        mask[:, :padding] = 0
        start = key - padding
        band = (key >= padding) & (key <= query) & ((key > query - WINDOW) | (start < N_SINKS)) if padding else near
        wanted = _logits(plain, ids[:, padding:], attention_mask=band[padding:, padding:][None, None].expand(2, 1, -1, -1))
        found = _logits(model, ids, attention_mask=mask)[:, padding:]
        if family == "gpt2" and padding:
            continue  # its positions count padding unless they are given
        same(found, wanted, 2e-4, f"window alone, {padding} of padding")


def _closed_is_original(family: str, seed: int) -> None:
    n = 40
    for dtype in (torch.float32, torch.bfloat16):
        ids, plain = tokens(2, n, seed), original(family, seed, dtype)
        wanted = {name: _logits(plain, ids, **given) for name, given in masks(n, seed).items()
                  if dtype == torch.float32 or "float" not in name}  # fmt: skip
        model = patched(family, 0.0, seed, dtype)
        for name, given in masks(n, seed).items():
            if name in wanted:
                with closed(model):
                    same(_logits(model, ids, **given), wanted[name], 0.0, f"closed, {dtype}, mask: {name}")
        remove(model)
        same(_logits(model, ids), wanted["none"], 0.0, f"removed, {dtype}")


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
        same(_logits(plain, other, **given)[seen], _logits(plain, ids, **given)[seen], 1e-5, f"the original, {name}")
        try:
            found, wanted = _logits(model, other, **given), _logits(model, ids, **given)
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
    same(_logits(model, other)[0, :cut], _logits(model, ids)[0, :cut], 0.0, "bfloat16, future and other sequence")


def _cache(kind: str, model: Any, n: int) -> Any:
    from transformers import cache_utils

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
        same(parts(plain), _logits(plain, ids), tolerance, f"the original with a {kind} cache")
    except (Exception, FaultFoundError) as error:
        raise NotHereError(f"the original does not work with a {kind} cache here: {error}") from error
    for name, threshold in THRESHOLDS.items():
        model = patched(family, threshold, seed)
        found = _refusable(functools.partial(parts, model))
        same(found, _logits(model, ids), tolerance, f"{name}, {kind} cache, in {len(lengths)} calls")
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
        if kind in ("static", "offloaded", "offloaded static"):
            implementation = kind.replace("offloaded static", "offloaded_static")
            wanted = model.generate(ids, **options)
            generated = model.generate(ids, cache_implementation=implementation, **options)
            if not torch.equal(generated, wanted):
                raise FaultFoundError(Fault.WRONG, f"{name}: generate with a {kind} cache gives other tokens")


PATCH_CHECKS: dict[str, Callable[[str, int], None]] = {
    "all read is the original, under every mask": _open_is_original,
    "none reads is the window, under every padding": _none_is_window,
    "closed or removed is the original, bit by bit": _closed_is_original,
    "what a mask hides does not matter": _hidden_tokens,
    "bfloat16: no leak, bit by bit": _leaks_in_bf16,
    "padding on the right": _with_patches(_model_padding("right")),
    "batch of one against many": _with_patches(_model_batch),
    "with a cache against without": _with_patches(_model_cached),
    "prefill in pieces against one pass": _with_patches(_model_chunks),
    "future tokens do not matter": _with_patches(_model_future),
    "other sequences do not matter": _with_patches(_model_others),
    "packed by position_ids against alone": _with_patches(_model_packed("position_ids")),
    "generate against whole passes": _with_patches(_model_generate),
}
