"""A tiny CRAM language model whose gates say yes to some tokens and no to others."""

import torch

from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.memory.router import BenefitGate
from cramlab.memory.write_gate import SalienceGate


def make(**changes):
    config = CRAMForCausalLMConfig(
        **{
            "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "memory_capacity": 12, "state_size": 16, "semantic_rank": 8, "pad_token_id": 0,
        } | changes
    )  # fmt: skip
    model = CRAMForCausalLM(config).eval()
    with torch.no_grad():
        for gate in model.modules():
            if isinstance(gate, (BenefitGate, SalienceGate)):
                gate.out.weight.normal_()
                gate.out.bias.zero_()
        model.embed_tokens.weight.normal_()
        if model.bigrams is not None:
            model.bigrams.table.normal_()
            model.bigrams.scale.uniform_(0.2, 1)
    return model


def ids(n_batch=3, n_tokens=20):
    return torch.randint(3, 50, (n_batch, n_tokens))
