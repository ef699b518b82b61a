"""Models that `benchmarks.serving` times: shapes with random weights, and a consolidation that is loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from cramlab import load_consolidated
from cramlab.consolidation.patch import consolidatable_sites, install
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.hf.loading import load

WINDOW, N_SINKS, RANK, UNITS = 64, 4, 64, 32  # those of the consolidated SmolLM2
OPEN, SHUT = -torch.inf, torch.inf  # thresholds


def _llama(hidden: int, layers: int, heads: int, groups: int, width: int, mlp: int, vocab: int) -> Any:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=width, intermediate_size=mlp, vocab_size=vocab, max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


SHAPES = {
    "1b": lambda: _llama(2048, 16, 32, 8, 64, 8192, 128256),  # Llama-3.2-1B
    "1b-mha": lambda: _llama(2048, 16, 16, 16, 128, 8192, 100352),  # OLMo-2-1B, the neighbour's
    "8b": lambda: _llama(4096, 32, 32, 8, 128, 14336, 128256),  # Llama-3.1-8B
    "tiny": lambda: _llama(64, 3, 4, 2, 16, 96, 128),  # for tests
}


class Made(NamedTuple):
    """The original and the patched model, which share their weights, and what is known of the gates.

    Attributes:
        original: without a patch.
        patched: with gates at every layer.
        shares: share of the steps at which a gate is forced open, by layer; None: the gates decide.
        tokens: text, (documents, T); None: random tokens.
    """

    original: Any
    patched: Any
    shares: list[float] | None
    tokens: Tensor | None


def shared_copy(model: Any) -> Any:
    """Another model with the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def forced_shares(n_layers: int, mean: float, of: Sequence[float] | None = None) -> list[float]:
    """Shares of open gates by layer, with the given mean.

    Args:
        n_layers: number of layers.
        mean: of all layers.
        of: shares by layer of a real model, stretched over the layers and scaled to the mean; None: every fourth layer
            has four fifths of the reads, which is a guess and not measured.
    """
    if of is None:
        raw = [0.8 if i % 4 == 1 else 0.2 / 3 for i in range(n_layers)]
    else:
        raw = [of[i * len(of) // n_layers] for i in range(n_layers)]
    total = sum(raw)
    return [min(1.0, share * mean * n_layers / total) if total else mean for share in raw]


def random_model(shape: str, read_frac: float, of: Sequence[float] | None, where: torch.device) -> Made:
    """A Llama with random weights whose gates are forced open at random."""
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with where:
            model = LlamaForCausalLM(SHAPES[shape]()).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    original = shared_copy(model)
    layers = {}
    for site in consolidatable_sites(model):
        layer = ConsolidatedAttention.beside(site, rank=RANK, units=UNITS, window=WINDOW, n_sinks=N_SINKS)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=1e-3)
        layers[site.layer] = layer
    install(model, layers)
    return Made(original, model, forced_shares(len(layers), read_frac, of), None)


def consolidated_model(name: str, folder: Path, text: str, n_documents: int, where: torch.device) -> Made:
    """A pretrained model with its consolidation, and documents of a text."""
    from cramlab.auditing import read_corpus

    pretrained = load(name)
    original = pretrained.model.requires_grad_(False)
    patched = load_consolidated(shared_copy(original), folder)
    if where.type == "cuda":
        original, patched = (model.to(where, torch.bfloat16) for model in (original, patched))  # still shared
    longest = sorted((document.text for document in read_corpus(text).documents), key=len)[-n_documents:]
    encoded = [pretrained.encode(document[: 1 << 19]) for document in longest]
    shortest = min(map(len, encoded))
    tokens = torch.tensor([ids[:shortest] for ids in encoded], device=where)
    return Made(original, patched, None, tokens)


def filled_cache(config: Any, n_batch: int, context: int, room: int, like: Tensor) -> StaticCache:
    """A static cache of random keys and values; its length is `context`."""
    cache = StaticCache(config=config, max_cache_len=context + room)
    cache.early_initialization(n_batch, config.num_key_value_heads, _width(config), like.dtype, like.device)
    for layer in cast("list[Any]", cache.layers):
        for entries in (layer.keys, layer.values):
            entries.normal_()
        layer.cumulative_length.fill_(context)
    return cache


def cache_bytes(config: Any, n_batch: int, context: int, itemsize: int) -> int:
    """Bytes of the keys and values of a batch."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * _width(config) * itemsize
    return per_token * n_batch * context


def _width(config: Any) -> int:
    """Width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
