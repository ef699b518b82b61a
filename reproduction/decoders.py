"""Tiny random models of decoders of transformers, and what is expected of each: the one list behind tests and table.

A model has four layers, unless its settings say otherwise, and is built from its config; nothing is downloaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

# Sizes by the names that configs give them; a config takes those that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "attention_dropout": 0.0,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "ffn_dim": 48,
    "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "encoder_layers": 4, "decoder_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 1,
    "moe_k": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

ALL = (0, 1, 2, 3)
# Why a model is not patched, by a short name: the pattern of the error's message.
REASONS = {
    "attention code of its own": "attention code of its own",
    "a sliding window in every layer": "every layer attends to a sliding window",
    "config.is_decoder is not set": r"config\.is_decoder = False",
    "keys chosen by an indexer": "every layer gives its attention indices",
    "no attention": "is an attention module with heads and maps of its own$",
    "attention without modules of its own": "could not be told to be",
    "no output projection that is a module": "has no output projection",
    "one attention module for several layers": "more than once in a pass",
}


@dataclass(frozen=True)
class Decoder:
    """A tiny model and what is expected.

    Attributes:
        patched: layers whose far reads can be skipped, or why there are none, a name in `REASONS`.
        audited: layers that an audit takes, or why there are none.
        settings: fields of its config.
    """

    patched: tuple[int, ...] | str = ALL
    audited: tuple[int, ...] | str = ALL
    settings: Mapping[str, Any] = field(default_factory=dict)


def _mixed(*layers: int, audited: tuple[int, ...] | None = None, **settings: Any) -> Decoder:
    """A model of whose layers some are patched; an audit takes all, or `audited`."""
    return Decoder(layers, ALL if audited is None else audited, settings)


def _hybrid(*layers: int, **settings: Any) -> Decoder:
    """A model with attention in some layers only."""
    return Decoder(layers, layers, settings)


def _refused(reason: str, **settings: Any) -> Decoder:
    """A model that an audit takes and a patch does not."""
    return Decoder(reason, ALL, settings)


def _without(reason: str, **settings: Any) -> Decoder:
    """A model that neither takes."""
    return Decoder(reason, reason, settings)


_OWN, _WINDOW, _INDEXER = "attention code of its own", "a sliding window in every layer", "keys chosen by an indexer"
_UNSET = "config.is_decoder is not set"
_MLA = {"head_dim": 4, "num_key_value_heads": 4}
_DSA = _MLA | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_TURNS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MAMBA_TURNS = {"layer_types": ["mamba", "attention"] * 2}
_CONV_TURNS = {"layer_types": ["conv", "full_attention"] * 2}

DECODERS: dict[str, Decoder] = {
    "afmoe": _mixed(3),
    "apertus": Decoder(),
    "arcee": Decoder(),
    "aria_text": Decoder(),
    "axk1": Decoder(settings=_MLA),
    "bamba": _hybrid(1, 3, attn_layer_indices=[1, 3]),
    "bart": Decoder(),
    "bert": _refused(_UNSET),
    "biogpt": Decoder(),
    "bitnet": Decoder(),
    "bloom": _refused(_OWN),
    "codegen": _refused(_OWN, rotary_dim=4),
    "cohere": Decoder(),
    "cohere2": _mixed(3),
    "ctrl": Decoder(settings={"n_embd": 32, "dff": 48}),
    "cwm": _mixed(0),
    "dbrx": Decoder(settings={
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
    }),
    "deepseek_v2": Decoder(settings=_MLA),
    "deepseek_v3": Decoder(settings=_MLA),
    "deepseek_v32": _refused(_INDEXER, **_DSA),
    "diffllama": Decoder(),
    "doge": Decoder(),
    "dots1": Decoder(settings={"n_shared_experts": 1, "first_k_dense_replace": 1}),
    "electra": _refused(_UNSET),
    "ernie4_5": Decoder(),
    "ernie4_5_moe": Decoder(),
    "exaone4": _mixed(3),
    "exaone_moe": _mixed(3),
    "falcon": _refused(_OWN),
    "falcon_h1": Decoder(),
    "falcon_mamba": _without("no attention"),
    "flex_olmo": Decoder(),
    "gemma": Decoder(),
    "gemma2": _mixed(1, 3, sliding_window=8),
    "gemma3_text": _mixed(1, 3, **_TURNS),
    "gemma3n_text": _mixed(1, 3, **_TURNS, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
                           vocab_size_per_layer_input=61, activation_sparsity_pattern=[0.0] * 4),
    "glm": Decoder(),
    "glm4": Decoder(),
    "glm4_moe": Decoder(),
    "glm4_moe_lite": Decoder(settings=_MLA),
    "glm_moe_dsa": _refused(_INDEXER, **_DSA),
    "gpt2": Decoder(),
    "gpt_bigcode": Decoder(),
    "gpt_neo": _refused(_OWN, attention_types=[[["global", "local"], 2]]),
    "gpt_neox": Decoder(),
    "gpt_neox_japanese": _refused(_OWN),
    "gpt_oss": _mixed(1, 3, sliding_window=8),
    "gptj": _refused(_OWN, rotary_dim=4),
    "granite": Decoder(),
    "granitemoe": Decoder(),
    "granitemoehybrid": _hybrid(1, 3, **_MAMBA_TURNS),
    "granitemoeshared": Decoder(),
    "helium": Decoder(),
    "hrm_text": _without("one attention module for several layers"),
    "hunyuan_v1_dense": Decoder(),
    "hunyuan_v1_moe": Decoder(),
    "hy_v3": Decoder(),
    "hyperclovax": Decoder(),
    "jais2": Decoder(),
    "jamba": _hybrid(1, 3, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4),
    "jetmoe": _without("no output projection that is a module"),
    "laguna": Decoder(),
    "lfm2": _hybrid(1, 3, **_CONV_TURNS),
    "lfm2_moe": _hybrid(1, 3, **_CONV_TURNS, num_dense_layers=1),
    "llama": Decoder(),
    "llama4_text": _mixed(3),
    "mamba": _without("no attention"),
    "mamba2": _without("no attention", num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "mbart": Decoder(),
    "mimo_v2_flash": _mixed(0),
    "minicpm3": Decoder(settings=_MLA),
    "minimax": _hybrid(0, 2),
    "minimax_m2": Decoder(),
    "ministral": _mixed(1, 3, **_TURNS),
    "ministral3": Decoder(),
    "mistral": Decoder(_WINDOW),
    "mixtral": Decoder(),
    "modernbert-decoder": _mixed(0, 3),
    "mpt": _refused(_OWN),
    "nanochat": Decoder(),
    "nemotron": Decoder(),
    "nemotron_h": _hybrid(1, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=1,
                          layers_block_type=["mamba", "attention", "mamba", "mlp"]),
    "olmo": Decoder(),
    "olmo2": Decoder(),
    "olmo3": _mixed(3),
    "olmo_hybrid": _hybrid(3),
    "olmoe": Decoder(),
    "openai-gpt": _refused(_OWN),
    "opt": Decoder(),
    "persimmon": Decoder(),
    "phi": Decoder(),
    "phi3": Decoder(),
    "phimoe": Decoder(),
    "qwen2": Decoder(),
    "qwen2_moe": Decoder(),
    "qwen3": Decoder(),
    "qwen3_5_text": _hybrid(3),
    "qwen3_moe": Decoder(),
    "qwen3_next": _hybrid(3),
    "recurrent_gemma": Decoder(_WINDOW, (2,)),
    "roberta": _refused(_UNSET),
    "rwkv": _without("attention without modules of its own"),
    "seed_oss": Decoder(),
    "smollm3": Decoder(),
    "solar_open": Decoder(),
    "stablelm": Decoder(),
    "starcoder2": Decoder(),
    "vaultgemma": _mixed(1, 3, sliding_window=8),
    "xglm": _refused(_OWN),
    "xlnet": _without("attention without modules of its own"),
    "youtu": Decoder(settings=_MLA),
}  # fmt: skip


@functools.cache
def _names(config: type) -> frozenset[str]:
    """Names that a config class takes."""
    names = {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}
    for base in config.__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return frozenset(names | set(getattr(config, "attribute_map", {})))


def build(model_type: str) -> nn.Module:
    """The tiny model of a type, in evaluation mode, with weights large enough to tell its parts apart."""
    config_class = CONFIG_MAPPING[model_type]
    renamed = getattr(config_class, "attribute_map", {})
    sizes = {name: value for name, value in _SIZES.items() if name in _names(config_class)}
    sizes = {name: value for name, value in sizes.items() if renamed.get(name) not in sizes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_class(**sizes | dict(DECODERS[model_type].settings))
        model = getattr(transformers, CLASSES[model_type])(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
    return model
