"""The small model of the package glassllm (npz weights, NumPy forward) as a Llama of transformers."""

from __future__ import annotations

from typing import Any

import glassllm
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

_LAYER = {
    "norm1.gamma": "input_layernorm.weight",
    "attn.W_Q": "self_attn.q_proj.weight",
    "attn.W_K": "self_attn.k_proj.weight",
    "attn.W_V": "self_attn.v_proj.weight",
    "attn.W_O": "self_attn.o_proj.weight",
    "norm2.gamma": "post_attention_layernorm.weight",
    "ffn.W1": "mlp.gate_proj.weight",
    "ffn.W2": "mlp.down_proj.weight",
    "ffn.W3": "mlp.up_proj.weight",
}


def convert(language: str) -> tuple[LlamaForCausalLM, Any]:
    """The converted model, and glassllm's own tokenizer.

    glassllm computes x @ W and rotates pairs of neighbouring dimensions; Llama computes W @ x and rotates the two
    halves of a head. So matrices are transposed, and the dimensions of query and key heads are sorted into halves.
    """
    source, tokenizer = glassllm.load_pretrained(language)
    cfg = source.cfg
    weights = {name: torch.from_numpy(p.data).float() for name, p in source.named_parameters().items()}
    config = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=weights["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        max_position_embeddings=cfg.max_len,
        rms_norm_eps=cfg.eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    for layer in range(cfg.n_layers):
        for ours, theirs in _LAYER.items():
            weight = weights[f"blocks.{layer}.{ours}"]
            if ours in ("attn.W_Q", "attn.W_K"):
                weight = _halves(weight, cfg.d_model // cfg.n_heads)
            state[f"model.layers.{layer}.{theirs}"] = weight.T if weight.ndim == 2 else weight
    state["lm_head.weight"] = weights["E"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.tie_weights()
    return model.float().eval(), tokenizer


def _halves(weight: Tensor, d_head: int) -> Tensor:
    """The columns (D, H Dh) of each head, even dimensions first, then odd ones."""
    heads = weight.unflatten(1, (-1, d_head // 2, 2))  # (D, H, Dh / 2, 2)
    return heads.transpose(2, 3).flatten(1)
