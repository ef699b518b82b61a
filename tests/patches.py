"""Tiny patched models with random adapters and gates that let some tokens read and others not."""

import torch
from families import GROUPED, build
from transformers import MistralConfig, MistralForCausalLM

from cramlab.consolidation.patch.install import consolidatable_sites
from cramlab.consolidation.rules.learned import ConsolidatedAttention

NAMES = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gpt_neox"]
WINDOW, N_SINKS = 6, 2
EVERYTHING, NOTHING = -float("inf"), float("inf")  # thresholds


def model_of(name):
    """A causal model in evaluation mode without a sliding window."""
    if name != "mistral":
        return build(name)
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)).eval()


def layers_for(model, rank=3, window=WINDOW, n_sinks=N_SINKS, seed=0):
    """Random adapters and gates for all layers that have far reads."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for site in consolidatable_sites(model):
        layer = ConsolidatedAttention.beside(site, rank=rank, window=window, n_sinks=n_sinks, n_offsets=7)
        for name, parameter in layer.named_parameters():
            if name == "offsets":  # another threshold from position to position
                parameter.data = torch.linspace(-0.1, 0.1, len(parameter)).to(parameter)
                continue
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        layer.gate.weight.data[:, site.d_model :] = 0.0  # scores on both sides of the threshold
        layer.gate.bias.data.zero_()
        layers[site.layer] = layer
    return layers


def at(layers, threshold):
    """The same layers with one threshold."""
    return {i: layer.at(threshold) for i, layer in layers.items()}
