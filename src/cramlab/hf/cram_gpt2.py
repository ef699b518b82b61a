"""GPT-2 with a CRAM layer in place of every attention sub-layer; everything else is GPT-2's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cramlab.memory import CRAMConfig, CRAMLayer, EpisodicMemoryConfig
from cramlab.mixer import MixerOutput, Routing


class CramGPT2Config(GPT2Config):
    """GPT-2's config; the CRAM layers are `CRAMConfig()` with `n_head` heads and room for the whole context."""

    model_type = "cram_gpt2"


class MixerAttention(nn.Module):
    """A CRAM layer that looks to GPT-2 like its attention. All tokens are one unit of time apart.

    Attributes:
        routing: what the next passes ask of the router; None: the router's own rule, as decoding uses it.
        without_reads: whether the next passes answer as if no token had read.
        output: what the mixer returned on the last pass.
    """

    def __init__(self, config: CramGPT2Config) -> None:
        super().__init__()
        episodic = EpisodicMemoryConfig(n_heads=config.n_head, capacity=config.n_positions)
        self.mixer: CRAMLayer = dataclasses.replace(CRAMConfig(), episodic=episodic).build(config.n_embd)
        self.routing: Routing | None = None
        self.without_reads = False
        self.output: MixerOutput | None = None

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Mixes (B, T, D); GPT-2 expects attention weights beside it."""
        gaps = hidden_states.new_ones(hidden_states.shape[:2])
        routing = self.routing or Routing()
        if self.without_reads:
            routing = routing._replace(counterfactual=True)
        output: MixerOutput = self.mixer(hidden_states, gaps, routing=routing)
        self.output = output
        if self.without_reads:
            assert output.y_without_reads is not None
            return output.y_without_reads, None
        return output.y, None


class CramGPT2LMHeadModel(GPT2LMHeadModel):
    """A GPT-2 whose attention has been replaced; saved and loaded like any other. Without a cache: for audits."""

    config_class = CramGPT2Config  # type: ignore[assignment]

    _supports_attention_backend = False  # its blocks have no attention function to replace

    def __init__(self, config: CramGPT2Config) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            block.attn = MixerAttention(config)

    def _init_weights(self, module: nn.Module) -> None:
        """CRAM layers bring their own initial weights."""
        if not any(module is part for layer in self.mixers() for part in layer.modules()):
            super()._init_weights(module)

    def mixers(self) -> list[MixerAttention]:
        """In order of depth."""
        return [cast(MixerAttention, b.attn) for b in self.transformer.h if isinstance(b.attn, MixerAttention)]


@contextlib.contextmanager
def routed(model: nn.Module, routing: Routing, without_reads_in: int | None = None) -> Iterator[None]:
    """While open, every CRAM layer of a model is asked for `routing`; models without any are left alone.

    Args:
        model: the model.
        routing: what is asked.
        without_reads_in: the layer that answers as if no token had read; None: no layer.
    """
    mixers = [module for module in model.modules() if isinstance(module, MixerAttention)]
    try:
        for layer, mixer in enumerate(mixers):
            mixer.routing, mixer.without_reads = routing, layer == without_reads_in
        yield
    finally:
        for mixer in mixers:
            mixer.routing, mixer.without_reads = None, False


def reads_frac(model: nn.Module) -> Tensor | None:
    """Share of tokens that read on the last pass, layer by layer, (L,); None for a model without CRAM layers."""
    outputs = [module.output for module in model.modules() if isinstance(module, MixerAttention)]
    shares = [output.trace.scored.double().mean() for output in outputs if output is not None]
    return torch.stack(shares) if shares else None


AutoConfig.register(CramGPT2Config.model_type, CramGPT2Config)
AutoModelForCausalLM.register(CramGPT2Config, CramGPT2LMHeadModel)
