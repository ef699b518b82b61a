"""Rows of `benchmarks.serving`: one kernel, one step of a model, and a whole answer, each in several ways."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.serving_models import (
    N_SINKS,
    OPEN,
    SHAPES,
    SHUT,
    WINDOW,
    Made,
    cache_bytes,
    filled_cache,
)
from benchmarks.timing import as_graphs, core_ms, cuda_ms, side_by_side
from cramlab.consolidation.patch import Counts
from cramlab.consolidation.serving import DecodeStep
from cramlab.ops.gated_decode import attention
from cramlab.timing import wall_ms

ROOM = 64  # tokens that a cache has room for behind the context
N_DRAWS = 64  # draws of all gates
Ways = dict[str, Callable[[], Any]]
Around = Callable[[str], contextlib.AbstractContextManager[Any]]


class DoesNotFit(Exception):  # noqa: N818 - a row that is left out is no error
    """The card has not the memory for a row, or the text is too short."""


def timed(ways: Ways, repeats: int, device: torch.device, around: Around = contextlib.nullcontext) -> dict[str, Any]:
    """Times ways side by side; the first is what the others are compared with."""
    clock, warmups = (cuda_ms, 3) if device.type == "cuda" else (core_ms, 1)
    return side_by_side(ways, repeats=repeats, warmups=warmups, clock=clock, around=around)


def draws(shares: list[float], n_batch: int, device: torch.device) -> Tensor:
    """Thresholds that force gates open at random with the shares by layer, (draws, L, B)."""
    chance = torch.rand(N_DRAWS, len(shares), n_batch, generator=torch.Generator().manual_seed(0))
    is_open = chance < torch.tensor(shares)[:, None]
    return torch.where(is_open, OPEN, SHUT).to(device)


@torch.no_grad()
def kernel(shape: str, n_batch: int, context: int, read_frac: float, repeats: int, device: torch.device) -> dict:
    """Times the attention of one layer with random gates, in milliseconds of one call.

    The limit is the time in which the card copies as many bytes as the gated read must load.
    """
    config, dtype = SHAPES[shape](), torch.bfloat16 if device.type == "cuda" else torch.float32
    groups, width = config.num_key_value_heads, config.head_dim
    need(3 * cache_bytes(config, n_batch, context, dtype.itemsize) // config.num_hidden_layers, device)
    rand = functools.partial(torch.randn, device=device, dtype=dtype)
    query = rand(n_batch, config.num_attention_heads, width)
    key, value = (rand(n_batch, groups, context, width) for _ in range(2))
    first, end = (torch.full((n_batch,), n, dtype=torch.int64, device=device) for n in (0, context))
    given = (query, key, value, first, end, WINDOW, N_SINKS, width**-0.5)
    n_calls = 20
    chance = torch.rand(n_calls, n_batch, 1, generator=torch.Generator().manual_seed(0))
    order = chance.flatten().argsort().argsort().view_as(chance)
    gates = (order < round(read_frac * order.numel())).to(device)  # as many open ones as the share says

    def gated() -> None:
        for reads in gates:
            attention.gated_read(attention.near_read(*given), reads, *given)

    def exact() -> None:
        for _ in range(n_calls):
            F.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)

    def full() -> None:
        for _ in range(n_calls):
            attention.full_read(*given[:5], width**-0.5)

    def near() -> None:
        for _ in range(n_calls):
            attention.near_read(*given)

    works = {"full, split-K kernel": full, "full, PyTorch's attention": exact, "gated": gated, "near alone": near}
    ways, failed = as_graphs(works) if device.type == "cuda" else (works, {})
    found = timed(ways, repeats, device)
    per_key = 2 * groups * width * dtype.itemsize
    n_open = float(gates.float().mean()) * n_batch
    loaded = per_key * (n_open * (context - WINDOW - N_SINKS) + n_batch * (WINDOW + N_SINKS))
    for way in found.values():
        way["ms"] = {name: ms / n_calls for name, ms in way["ms"].items()}
    error = (attention.gated_read(attention.near_read(*given), gates[0] | True, *given)
             - attention.full_read(*given[:5], width**-0.5)).float().abs().max()  # fmt: skip
    return failed | {
        "ways": found, "read_frac": n_open / n_batch, "bytes_full": per_key * n_batch * context,
        "bytes_gated": loaded, "ms_limit": copy_ms(loaded, device), "difference_all_open": float(error),
    }  # fmt: skip


@functools.cache
def _copy_rate(device: torch.device) -> float:
    """Bytes a millisecond that are loaded and stored by a copy, both counted."""
    source = torch.empty(1 << (31 if device.type == "cuda" else 22), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms = timed({"copy": lambda: target.copy_(source)}, 11, device)["copy"]["ms"]["median"]
    return 2 * source.numel() / ms


def copy_ms(n_bytes: float, device: torch.device) -> float:
    """Milliseconds in which the device copies these bytes."""
    return n_bytes / _copy_rate(device)


def need(n_bytes: float, device: torch.device) -> None:
    """Raises `DoesNotFit` when the card has less than this and a tenth free."""
    if device.type == "cuda" and n_bytes * 1.1 > (free := torch.cuda.mem_get_info(device)[0]):
        raise DoesNotFit(f"wants {n_bytes / 1e9:,.0f} GB of {free / 1e9:,.0f} GB that are free")


@torch.no_grad()
def step(
    made: Made, n_batch: int, context: int, repeats: int, device: torch.device, *, compiled: bool, eager: bool
) -> dict:
    """Times one token of a batch, in milliseconds; all ways read the same keys and values.

    These are a text's where the model has one, and its own gates decide about the tokens that follow; otherwise they
    are random, and gates are forced.

    Args:
        made: the model.
        n_batch: number of sequences.
        context: number of tokens in the cache.
        repeats: timed calls of each way.
        device: where.
        compiled: compile the steps by `torch.compile(mode="reduce-overhead")`; False: record them as CUDA graphs.
        eager: time the original with a `DynamicCache`, too, which wants the memory of another cache.
    """
    config, like = made.original.config, next(made.original.parameters())
    n_bytes = cache_bytes(config, n_batch, context, like.element_size())
    need((2.1 if eager else 1.05) * n_bytes, device)
    tokens = torch.zeros(n_batch, 1, dtype=torch.int64, device=device)
    positions = torch.full_like(tokens, context)
    every, gated = (DecodeStep(made.patched, n_batch=n_batch, capacity=context + ROOM, gated=g) for g in (False, True))
    prompts = tokens if made.tokens is None else text_of(made, n_batch, context + ROOM)
    if made.tokens is None:
        gated.cache = filled_cache(config, n_batch, context, ROOM, like)
    else:
        gated.prefill(prompts[:, :context])
    every.cache = cache = gated.cache

    def original(past: Any) -> Any:
        return made.original(input_ids=tokens, position_ids=positions, past_key_values=past, use_cache=True).logits

    turn = 0

    @contextlib.contextmanager
    def reset(_: str) -> Iterator[None]:  # every call lengthens the cache
        nonlocal turn
        gated.length = context
        turn = turn if made.tokens is None else 0
        yield

    ready: Ways = {
        "original, static cache, split-K kernel": lambda: every(tokens),
        "original, static cache, SDPA": lambda: original(cache)[:, -1],
        "gated": lambda: gated(tokens),
    }
    compiling = compiled and device.type == "cuda"
    differences = _differences(ready, gated, reset)
    failed: dict[str, Any] = {}
    if compiling:
        mode: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        inner = torch.compile(original, **mode)
        steps = {
            "original, static cache, split-K kernel": torch.compile(every, **mode),
            "original, static cache, SDPA": lambda _: inner(cache),
            "gated": torch.compile(gated, **mode),
        }
        ready, failed = _that_run({name: functools.partial(one, tokens) for name, one in steps.items()})
    elif device.type == "cuda":
        graphs, failed = as_graphs(ready)
        ready = {name.removesuffix(", as a graph"): graph for name, graph in graphs.items()}
    ways, limits = dict(ready), gated.thresholds.clone()
    if "gated" in ways:
        replay = ways.pop("gated")
        table = None if made.shares is None else draws(made.shares, n_batch, device)

        def ours() -> None:
            nonlocal turn
            gated.thresholds.copy_(limits if table is None else table[turn % N_DRAWS])
            if made.tokens is not None:
                tokens.copy_(prompts[:, context + turn % ROOM, None])
            turn += 1
            replay()

        def fixed(threshold: float) -> Callable[[], None]:
            def call() -> None:
                gated.thresholds.fill_(threshold)
                replay()

            return call

        ways |= {"gated": ours, "gates open": fixed(OPEN), "window everywhere": fixed(SHUT)}
    if eager:
        ways["original, DynamicCache, eager"] = lambda: original(_dynamic(cache, context))
    gated.counted.zero_()
    for _ in range(N_DRAWS // 8 if "gated" in ways else 0):
        with reset(""):
            for _ in range(8):
                ways["gated"]()
    skipped = skipped_frac(gated.counts().values())
    found = timed(ways, repeats, device, reset)
    for way in found.values():
        way["tokens_per_s"] = 1e3 * n_batch / way["ms"]["median"]
    return failed | {
        "ways": found, "how": "compiled" if compiling else "recorded", "skipped_frac": skipped,
        "bytes_cache": n_bytes, "bytes_weights": sum(p.numel() * p.element_size() for p in made.original.parameters()),
        "differences": differences,
    }  # fmt: skip


def text_of(made: Made, n_batch: int, n_tokens: int) -> Tensor:
    """Tokens of a text, (B, T)."""
    assert made.tokens is not None
    ids = made.tokens[:n_batch, :n_tokens]
    if ids.shape != (n_batch, n_tokens):
        raise DoesNotFit(f"wants {n_batch} documents of {n_tokens} tokens; the text has {tuple(made.tokens.shape)}")
    return ids


def skipped_frac(counts: Iterable[Counts]) -> float:
    """Share of far reads that were skipped in all layers."""
    return sum(counts, Counts()).skipped_frac


def _differences(ways: Ways, gated: DecodeStep, reset: Around) -> dict[str, float]:
    """Largest difference from the logits of the original with SDPA, over their root mean square; gates open."""
    limits = gated.thresholds.clone()
    gated.thresholds.fill_(OPEN)
    logits = {}
    for name, way in ways.items():
        with reset(name):
            logits[name] = way().float().clone()
    gated.thresholds.copy_(limits)
    base = logits["original, static cache, SDPA"]
    size = base.square().mean().sqrt()
    return {name: float((own - base).abs().max() / size) for name, own in logits.items()}


def _that_run(ways: Ways) -> tuple[Ways, dict[str, Any]]:
    """The ways that compile and run, and the errors of the others."""
    good, failed = {}, {}
    for name, way in ways.items():
        try:
            for _ in range(3):
                way()
            good[name] = way
        except Exception as error:  # whatever a compiler raises, the other ways are timed
            failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
    return good, {"failed_ways": failed} if failed else {}


def _dynamic(cache: Any, context: int) -> DynamicCache:
    """A `DynamicCache` of the same keys and values, none copied."""
    found = DynamicCache()
    for static in cache.layers:
        layer = DynamicLayer()
        layer.lazy_initialization(static.keys, static.values)
        layer.keys, layer.values = (entries[:, :, :context] for entries in (static.keys, static.values))
        found.layers.append(layer)
    return found


@torch.no_grad()
def answer(made: Made, n_batch: int, context: int, n_tokens: int, repeats: int, device: torch.device) -> dict:
    """Times whole answers: prompts of a text and `n_tokens` greedy tokens; also the share of skipped reads by layer."""
    ids = text_of(made, n_batch, context)
    need(4 * cache_bytes(made.original.config, n_batch, context, 2), device)
    step = DecodeStep(made.patched, n_batch=n_batch, capacity=context + n_tokens)
    mask = torch.ones_like(ids)
    step.prefill(ids)
    through = step.recorded() if device.type == "cuda" else None

    def theirs(**options: Any) -> Tensor:
        return made.original.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, **options,
        )  # fmt: skip

    ways: Ways = {"original, DynamicCache": theirs}
    failed: dict[str, Any] = {}
    if device.type == "cuda":
        static = functools.partial(theirs, cache_implementation="static")  # generate compiles the step itself
        good, failed = _that_run({"original, static cache, compiled": static})
        ways |= good
    ways["gated"] = lambda: step.generate(ids, n_tokens=n_tokens, through=through)
    ways["prompt alone, original"] = lambda: made.original(input_ids=ids, use_cache=True, logits_to_keep=1)
    ways["prompt alone, gated"] = lambda: step.prefill(ids)
    ways["gated"]()
    step.counted.zero_()
    ours = ways["gated"]()
    counts = step.counts()
    found = side_by_side(ways, repeats=repeats, warmups=1, clock=wall_ms(device))
    for name, way in found.items():
        if not name.startswith("prompt"):
            way["tokens_per_s"] = 1e3 * n_batch * n_tokens / way["ms"]["median"]
    same = (ours == theirs()[:, context:]).float().mean()
    return failed | {
        "ways": found, "n_tokens": n_tokens, "skipped_frac_by_layer": {i: c.skipped_frac for i, c in counts.items()},
        "skipped_frac": skipped_frac(counts.values()), "same_tokens_frac": float(same),
    }  # fmt: skip
