"""Tiny random models for tests of many kinds, built from configs; `reproduction.decoders` has all types of decoders."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from cramlab.language_model import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.language_model.cram_gpt2 import CramGPT2Config, CramGPT2LMHeadModel

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 1}
GPT2_SIZES = {
    "vocab_size": 61, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 3, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip

BUILD = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16)),  # heads wider than the model
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, use_parallel_residual=True)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES | {"max_position_embeddings": 70, "pad_token_id": 1})),
    "cram": lambda: CRAMForCausalLM(
        CRAMForCausalLMConfig(**SIZES, memory_capacity=None, state_size=16, semantic_rank=8)
    ),
    "cram_gpt2": lambda: CramGPT2LMHeadModel(CramGPT2Config(**GPT2_SIZES)),
}
CAUSAL = [name for name in BUILD if name not in ("bert", "roberta")]


def build(name):
    """The family's model in evaluation mode, with weights large enough to tell its parts apart."""
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def documents(n_documents=12, n_tokens=40, vocab_size=61, seed=0):
    """Random tokens from 2 on (1 is RoBERTa's padding)."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(2, vocab_size, (n_documents, n_tokens), generator=generator))
