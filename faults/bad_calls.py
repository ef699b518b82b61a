"""Bad calls from Python: inputs, masks, caches and packed rows that do not fit a layer or a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cramlab.consolidation.patch.install import consolidatable_sites, install
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.mixer import Bounds, Routing
from faults.bad_settings import thinned
from faults.cases import Case, Fault, FaultFoundError, RefusedError, described
from faults.models import (
    D_MODEL,
    FAMILIES,
    INF,
    VOCABULARY,
    families,
    is_refusal,
    language_model,
    mixer,
    mixers,
    original,
    patched,
    tokens,
)

NAN = float("nan")


def cases(seed: int, share: float) -> Iterator[Case]:
    """Calls of layers, CRAM language models and patched models."""
    for maker in (_layers, _language_models, _configs, _patched):
        yield from thinned(list(maker(seed)), share, seed)


def _case(name: str, call: Callable[[], Any], right: Callable[[Any], str] | None = None) -> Case:
    return Case("calls from Python", name, functools.partial(_called, call, right))


def _called(call: Callable[[], Any], right: Callable[[Any], str] | None) -> None:
    """Checks that a call is refused with a message, or, if `right` is given, that its output is right."""
    try:
        with torch.no_grad():
            found = call()
    except Exception as error:
        if is_refusal(error) or (isinstance(error, IndexError) and "out of" in str(error)):
            raise RefusedError(described(error)) from error
        raise
    if right is None:
        raise FaultFoundError(Fault.ACCEPTED, "accepted without an error")
    if said := right(found):
        raise FaultFoundError(Fault.WRONG, said)


def _shape(*shape: int) -> Callable[[Tensor], str]:
    """Checks the shape of an output, and that all its values are finite."""

    def right(found: Tensor) -> str:
        if tuple(found.shape) != shape:
            return f"shape {tuple(found.shape)}, not {shape}"
        return "" if bool(torch.isfinite(found).all()) else "the output holds NaN or infinities"

    return right


# Layers.


def _layers(seed: int) -> Iterator[Case]:
    x, gaps = torch.randn(2, 9, D_MODEL).double(), torch.ones(2, 9).double()

    def changed(tensor: Tensor, value: float) -> Tensor:
        other = tensor.clone()
        other[1, 4] = value
        return other

    calls: dict[str, Callable[[Any], Any]] = {
        "x of two dimensions": lambda layer: layer(x[0], gaps[0]),
        "x of another width": lambda layer: layer(x[..., :-1], gaps),
        "x of four dimensions": lambda layer: layer(x[None], gaps[None]),
        "too few gaps": lambda layer: layer(x, gaps[:, :-1]),
        "gaps of one sequence": lambda layer: layer(x, gaps[:1]),
        "gaps with a last dimension": lambda layer: layer(x, gaps[..., None]),
        "a negative gap": lambda layer: layer(x, changed(gaps, -1.0)),
        "a gap that is no number": lambda layer: layer(x, changed(gaps, NAN)),
        "an infinite gap": lambda layer: layer(x, changed(gaps, INF)),
        "too short a mask": lambda layer: layer(x, gaps, valid=torch.ones(2, 8, dtype=torch.bool)),
        "a mask of one sequence": lambda layer: layer(x, gaps, valid=torch.ones(1, 9, dtype=torch.bool)),
    }
    for name in list(mixers()):
        for what, call in calls.items():
            yield _case(f"{name}: {what}", functools.partial(lambda c, n: c(mixer(n, seed)), call, name))

        def many(name: str = name) -> Tensor:
            layer = mixer(name, seed)
            state = layer(x, gaps, routing=Routing(oracle_reads=torch.ones(2, 9).bool())).state
            return layer(torch.cat([x, x]), torch.cat([gaps, gaps]), state,
                         routing=Routing(oracle_reads=torch.ones(4, 9).bool())).y  # fmt: skip

        if name != "memorizer":  # which keeps no state
            yield _case(f"{name}: a state of fewer sequences", many)

        def empty(name: str = name) -> Tensor:
            return mixer(name, seed)(x[:, :0], gaps[:, :0], routing=Routing(oracle_reads=torch.ones(2, 0).bool())).y

        yield _case(f"{name}: no tokens", empty, _shape(2, 0, D_MODEL))
    for bounds in ((0, 1), (1, 0), (-1, 5), (0, 0)):
        yield _case(f"cram: bounds {bounds}",
                    lambda b=bounds: mixer("cram", seed)(x, gaps, routing=Routing(bounds=Bounds(*b))).y)  # fmt: skip


# CRAM language models.


def _language_models(seed: int) -> Iterator[Case]:
    from transformers import DynamicCache, StaticCache

    ids = tokens(2, 9, seed)

    def model() -> Any:
        return language_model("roomy", seed)

    def call(**given: Any) -> Callable[[], Tensor]:
        return lambda: model()(**({"input_ids": ids} | given)).logits

    right = _shape(2, 9, VOCABULARY)
    one = torch.ones(2, 9)
    yield _case("language model: nothing", call(input_ids=None))
    yield _case("language model: ids and embeddings", call(inputs_embeds=torch.zeros(2, 9, D_MODEL).double()))
    for name, other in {
        "an id too large": torch.full((2, 9), VOCABULARY), "a negative id": torch.full((2, 9), -1),
        "ids of one dimension": ids[0], "ids of three": ids[None],
    }.items():  # fmt: skip
        yield _case(f"language model: {name}", call(input_ids=other))
    yield _case("language model: no tokens", call(input_ids=ids[:, :0]), _shape(2, 0, VOCABULARY))
    for name, mask in {
        "too short": one[:, :-2], "of one row": one[:1], "of one dimension": one[0], "of four, wrong": one[None, None],
        "not numbers": one * NAN, "of more rows": torch.ones(3, 9), "negative": -one,
    }.items():  # fmt: skip
        fine = right if name in ("negative",) else None
        yield _case(f"language model: mask {name}", call(attention_mask=mask), fine)
    square = torch.ones(9, 9).tril().bool()[None, None].expand(2, 1, 9, 9)
    plain = lambda found: _differs(found, model()(input_ids=ids).logits)  # noqa: E731
    yield _case("language model: mask of four dimensions, causal", call(attention_mask=square), plain)
    cut = square.clone()
    cut[..., 5:, :5] = False
    parts = lambda found: _differs(found[:, 5:], model()(input_ids=ids[:, 5:]).logits)  # noqa: E731
    yield _case("language model: mask of four dimensions, blocks", call(attention_mask=cut), parts)
    for name, cache in {
        "a DynamicCache": DynamicCache, "a StaticCache": lambda: StaticCache(config=model().config, max_cache_len=32),
        "a tuple": tuple, "a list": list, "a word": lambda: "cache", "a dict": dict,
    }.items():  # fmt: skip
        given = lambda make=cache: model()(input_ids=ids, past_key_values=make(), use_cache=True).logits  # noqa: E731
        yield _case(f"language model: cache {name}", given, plain)

    def others(n: int, kind: str = "roomy") -> Callable[[], Tensor]:
        def called() -> Tensor:
            cache = language_model(kind, seed)(input_ids=tokens(n, 5, seed), use_cache=True).past_key_values
            return model()(input_ids=ids, past_key_values=cache).logits

        return called

    yield _case("language model: cache of three rows", others(3))
    yield _case("language model: cache of one row", others(1))
    for name, positions in {
        "too short": torch.arange(5)[None], "backwards": torch.arange(8, -1, -1)[None].expand(2, -1),
        "negative": torch.arange(-4, 5)[None].expand(2, -1), "of three rows": torch.arange(9)[None].expand(3, -1),
        "with gaps": 2 * torch.arange(9)[None].expand(2, -1),
    }.items():  # fmt: skip
        yield _case(f"language model: positions {name}", call(position_ids=positions), plain)
    for name, keep in {"too many": 99, "negative": -1, "a word": "3", "a fraction": 1.5}.items():
        fine = plain if name == "too many" else None
        yield _case(f"language model: logits_to_keep {name}", call(logits_to_keep=keep), fine)
    for name, labels in {"too short": ids[:, :-1], "of one row": ids[:1], "too large": ids + VOCABULARY}.items():
        yield _case(f"language model: labels {name}", call(labels=labels))
    for ends in ((0, 5), (0, 20), (5, 3, 18), (1, 18), (0, 5, 5, 18)):
        given = {"cu_seq_lens_q": torch.tensor(ends).int(), "cu_seq_lens_k": torch.tensor(ends).int()}
        flat = ids.reshape(1, -1)
        fine = (lambda _: "") if ends == (0, 5, 5, 18) else None  # an empty document among others
        yield _case(f"language model: documents that end at {ends}", call(input_ids=flat, **given), fine)


def _differs(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    off = float((found - wanted).detach().abs().max())
    return "" if off < 1e-6 else f"off by {off:.3g}"


def _configs(_: int) -> Iterator[Case]:
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
             "num_attention_heads": 2, "state_size": 4, "semantic_rank": 2}  # fmt: skip
    bad: dict[str, tuple[Any, ...]] = {
        "vocab_size": (0, -1, 1.5, "x", NAN), "hidden_size": (0, -8, 7, 1.5, "8"), "intermediate_size": (0, -1, "x"),
        "num_hidden_layers": (0, -1, 1.5), "num_attention_heads": (0, -1, 3, 1.5, "x"), "state_size": (0, -1, 1.5),
        "semantic_rank": (0, -1, 1.5, "x"), "memory_capacity": (0, -1, 1.5, "x", NAN), "memory_write": ("x", "", 5),
        "router": ("x", "", "oracle", "random", "gumbel", [], ["benefit"], ["benefit"] * 3, 5, ["benefit", "x"]),
        "read_price": (NAN, INF, "x", None), "audit_frac": (-0.1, 1.5, NAN, "x"), "initializer_range": (NAN, INF, -1.0),
    }  # fmt: skip
    for field, values in bad.items():
        for value in values:
            name = f"CRAMForCausalLMConfig({field}={value!r})"
            fields = small | {field: value}
            yield _case(name, lambda given=fields: CRAMForCausalLM(CRAMForCausalLMConfig(**given)))


# Patched models.


def _patched(seed: int) -> Iterator[Case]:
    n = 24
    ids = tokens(2, n, seed)
    causal = torch.ones(n, n).tril().bool()
    seeing_ahead = causal.clone()
    seeing_ahead[3, 9] = True
    blind = causal.clone()
    blind[5] = False
    wide = {
        "sees ahead": seeing_ahead, "sees all": torch.ones(n, n).bool(), "a token that sees nothing": blind,
        "sees nothing": torch.zeros(n, n).bool(), "sees itself alone": torch.eye(n).bool(),
    }  # fmt: skip
    masks: dict[str, Tensor] = {name: square[None, None].expand(2, 1, n, n) for name, square in wide.items()}
    masks |= {f"{name}, float": torch.where(mask, 0.0, torch.finfo(torch.float32).min) for name, mask in masks.items()}
    distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).float()
    masks["a bias that falls with distance"] = torch.where(causal, 0.1 * distance, torch.finfo(torch.float32).min)[
        None, None
    ].expand(2, 1, n, n)
    heads = causal[None, None].repeat(2, 3, 1, 1)
    heads[:, 1, n // 2 :, 2:9] = False
    masks |= {
        "another for each head": heads,
        "too short": torch.ones(2, n - 3).long(), "too long": torch.ones(2, n + 3).long(),
        "of one row": torch.ones(1, n).long(), "of three rows": torch.ones(3, n).long(),
        "of three dimensions": torch.ones(2, n, n).tril().bool(), "of zeros": torch.zeros(2, n).long(),
        "a row of zeros": torch.stack([torch.ones(n), torch.zeros(n)]).long(),
        "one head more": causal[None, None].expand(2, 2, n, n), "too few keys": causal[None, None, :, 3:],
    }  # fmt: skip
    for family in FAMILIES:
        for name, mask in masks.items():
            yield _case(f"patched {family}: mask {name}", functools.partial(_masked, family, seed, ids, mask), str)
    for name in ("bert", "roberta", "cram_gpt2"):
        yield _case(f"patch of {name}", lambda name=name: consolidatable_sites(families().build(name)))
    yield _case("patch of a linear map", lambda: consolidatable_sites(torch.nn.Linear(2, 2)))
    yield _case("patch of nothing", lambda: consolidatable_sites(None))  # type: ignore[arg-type]
    yield _case("an empty patch", lambda: install(original("llama", seed), {}))
    for layer in (7, -1, "x"):
        yield _case(f"patch at layer {layer}", lambda layer=layer: install(
            patched("llama", 0.0, seed), {layer: None}))  # type: ignore[dict-item]  # fmt: skip


def _masked(family: str, seed: int, ids: Tensor, mask: Tensor) -> str:
    """With every read made, a patched model gives the original's output under any mask, or refuses the mask."""
    model = patched(family, -INF, seed)
    try:
        wanted = original(family, seed)(input_ids=ids, attention_mask=mask).logits
    except Exception:
        wanted = None  # where the original fails, the patched model may fail with the same error
    try:
        found = model(input_ids=ids, attention_mask=mask).logits
    except Exception:
        if wanted is None:
            return ""
        raise
    if wanted is None:
        return "accepted, although the original refuses"
    seen = torch.isfinite(wanted)
    if mask.ndim == 2 and mask.shape[0] == 2:
        shown = torch.zeros_like(ids)  # transformers hides all keys beyond a short mask
        shown[:, : mask.shape[1]] = mask[:, : ids.shape[1]]
        seen &= shown.bool()[..., None]
    if mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask == 0
        seen &= allowed[:, 0].any(-1)[..., None].expand_as(seen)
    off = (found - wanted)[seen].abs()
    return "" if not off.numel() or float(off.max()) < 2e-3 else f"off by {float(off.max()):.3g}"
