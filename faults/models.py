"""Tiny random models: mixers, CRAM language models, and pretrained families with a patch."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cramlab.catalog import MIXERS
from cramlab.consolidation.patch.install import consolidatable_sites, install
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.memory import CRAMConfig, EpisodicMemoryConfig, NothingConfig, RouterConfig, SlotsConfig
from cramlab.mixer import Mixer, MixerConfig

D_MODEL, VOCABULARY = 32, 61
WINDOW, N_SINKS = 6, 2
INF = float("inf")
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gpt_neox", "qwen2 sliding")


def _cram(**changes: Any) -> CRAMConfig:
    return dataclasses.replace(CRAMConfig(), **changes)


@functools.cache
def mixers() -> dict[str, MixerConfig]:
    """Every mixer of the catalog but the one that draws its reads by lot, and more CRAM layers; by name."""
    found: dict[str, MixerConfig] = {}
    for name, make in MIXERS.items():
        config = make()
        if name != "cram-random" and not isinstance(config, tuple) and config not in found.values():
            found[name] = config
    for capacity in (3, 9, None):
        for write in ("all", "salience"):
            episodic = EpisodicMemoryConfig(n_heads=2, capacity=capacity, write=write)  # type: ignore[arg-type]
            for router in ("benefit", "always"):
                name = f"cram capacity {capacity} {write} {router}"
                found[name] = _cram(episodic=episodic, router=RouterConfig(name=router))  # type: ignore[arg-type]
    small = EpisodicMemoryConfig(n_heads=4, capacity=5)
    found |= {
        "cram without working memory, small": _cram(working=None, episodic=small),
        "cram slots, small": _cram(semantic=SlotsConfig(), episodic=small),
        "cram nothing, small": _cram(semantic=NothingConfig(), episodic=small),
        "cram paper, small": dataclasses.replace(CRAMConfig.paper(), episodic=small),
    }
    return found


@functools.lru_cache(maxsize=4)
def mixer(name: str, seed: int, dtype: torch.dtype = torch.float64) -> Mixer:
    """One in evaluation mode, with weights large enough to tell its parts apart."""
    torch.manual_seed(seed)
    made = mixers()[name].build(D_MODEL).to(dtype).eval()
    return strong(made, 0.3)


def strong(model: Any, std: float = 0.2) -> Any:
    """Draws all matrices from a wider law, so that no part of a model is too weak to be noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return model


@functools.lru_cache(maxsize=4)
def language_model(kind: str, seed: int, dtype: torch.dtype = torch.float64) -> CRAMForCausalLM:
    """A CRAM language model; `kind` says how its buffer and its routers are."""
    capacity, write, router = {
        "roomy": (64, "all", "benefit"), "small": (7, "all", "benefit"), "salience": (9, "salience", "benefit"),
        "hybrid": (64, "all", ["never", "always"]), "unbounded": (None, "all", "benefit"),
        "recurrent": (8, "all", "never"),
    }[kind]  # fmt: skip
    torch.manual_seed(seed)
    config = CRAMForCausalLMConfig(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        memory_capacity=capacity, memory_write=write, state_size=8, semantic_rank=4, router=router,  # type: ignore[arg-type]
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return strong(CRAMForCausalLM(config).to(dtype).eval(), 0.3)


@functools.cache
def families() -> ModuleType:
    """The families that the tests build."""
    path = Path(__file__).parent.parent / "tests" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("families", importlib.util.module_from_spec(spec))
    if not hasattr(module, "BUILD"):
        spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=4)
def original(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The unpatched model of a family, in which all layers, or in one family some, see the whole context."""
    torch.manual_seed(seed)
    if family == "mistral":
        model = MistralForCausalLM(MistralConfig(**families().GROUPED, sliding_window=None))
    elif family == "qwen2 sliding":
        types = ["full_attention", "sliding_attention", "full_attention"]
        more = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
        model = Qwen2ForCausalLM(Qwen2Config(**families().GROUPED, **more))
    else:
        model = families().BUILD[family]()
    return strong(model.to(dtype).eval())


def patched(
    family: str, threshold: float, seed: int = 0, dtype: torch.dtype = torch.float32, *, silent: bool = False
) -> Any:
    """A model of a family with a patch at every layer.

    Args:
        family: one of `FAMILIES`.
        threshold: of every gate: -inf, all read; +inf, none; 0, some.
        seed: of weights and gates.
        dtype: of everything.
        silent: adapters answer nothing, so that a token which does not read gets what the window says.
    """
    original.cache_clear()
    model = original(family, seed, dtype)
    original.cache_clear()  # what is patched below belongs to the caller
    put_patch(model, threshold, seed, silent=silent)
    return model


def put_patch(model: nn.Module, threshold: float, seed: int = 0, *, silent: bool = False) -> None:
    """Patches every layer that can be; see `patched`."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for site in consolidatable_sites(model):
        layer = ConsolidatedAttention.beside(site, rank=3, window=WINDOW, n_sinks=N_SINKS)
        for parameter in layer.parameters():
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        layer.gate.weight.data[:, site.d_model :] = 0.0  # scores on both sides of the threshold
        layer.gate.bias.data.zero_()
        if silent and layer.up is not None:
            layer.up.weight.data.zero_()
            layer.up.bias.data.zero_()
        layer.threshold = threshold
        layers[site.layer] = layer.requires_grad_(False)
    install(model, layers)


def tokens(n_batch: int, n_tokens: int, seed: int) -> Tensor:
    """Random ids from 2 on, (B, T)."""
    return torch.randint(2, VOCABULARY, (n_batch, n_tokens), generator=torch.Generator().manual_seed(seed))


Refusals: tuple[type[Exception], ...] = (ValueError, NotImplementedError, TypeError)


def is_refusal(error: Exception) -> bool:
    """Whether an exception is a documented one with something to say."""
    strict = type(error).__name__.startswith("StrictDataclass")  # what transformers' own configs raise
    return (isinstance(error, Refusals) or strict) and len(str(error)) > 10
