"""What one training run of a language model is: the model, its sizes and how it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cramlab.config import ConfigError, Count, CountOrZero, Layers, Positive, Seed, Share, Size, Weight, checked
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.language_model.text import Part

ModelName = Literal["cram", "hybrid", "hybrid-first", "llama", "dense", "recurrent", "gpt2"]


@checked("")
class TextRunConfig:
    """A language model and its training.

    The learning rate rises over `warmup_steps` and falls along a cosine to a tenth.

    Attributes:
        model: "cram"; "llama" or "gpt2", with attention; or CRAM blocks of which all read ("dense"), none reads
            ("recurrent"), or one in eight reads: the fifth, as in Jamba ("hybrid"), or the first ("hybrid-first").
        seed: seed of weights, batches and audits.
        vocab_size: number of tokens of the tokenizer.
        context: tokens per sequence.
        n_layers: number of blocks.
        d_model: width.
        n_heads: attention heads.
        batch_size: sequences per step.
        n_steps: optimiser steps.
        learning_rate: largest learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup_steps: steps from zero to the largest learning rate.
        encoding_frac: share of the steps in which every token of a CRAM model reads; then its gates decide.
        read_price: smallest benefit that makes a read worthwhile, in nats; sets a CRAM model's trade-off.
        eval_every_steps: steps between two evaluations on held-out text; a stopped run resumes from the last of them.
        part: part of the held-out text to evaluate on; "validation" for choices such as the learning rate.
        device: torch device.
        n_checkpoints: models saved in folders of their own after the untrained one, at steps that grow by a constant
            factor; 0: none, not even the untrained one.
        first_checkpoint: step of the first of them.
    """

    model: ModelName = "cram"
    seed: Seed = 0
    vocab_size: Size = 2048
    context: Size = 256
    n_layers: Layers = 8
    d_model: Size = 128
    n_heads: Size = 4
    batch_size: Size = 16
    n_steps: Count = 1000
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 0.01
    warmup_steps: CountOrZero = 100
    encoding_frac: Share = 0.3
    read_price: Weight = 0.01
    eval_every_steps: Count = 100
    part: Part = "test"
    device: Annotated[str, Field(pattern="^(cpu|cuda|mps|meta)(:[0-9]+)?$")] = "cpu"
    n_checkpoints: Annotated[int, Field(ge=0, le=1000)] = 0
    first_checkpoint: Count = 30

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads = {self.n_heads} must divide d_model = {self.d_model}")
        if self.n_checkpoints and self.first_checkpoint > self.n_steps:
            raise ConfigError(f"first_checkpoint = {self.first_checkpoint} must be at most n_steps = {self.n_steps}")

    @property
    def name(self) -> str:
        """Stem of the record and folder of the saved models."""
        price = f"-price{self.read_price:g}" if self.model == "cram" else ""
        rate = f"-rate{self.learning_rate:g}-{self.n_steps}-steps" if self.part == "validation" else ""
        return f"{self.model}{price}{rate}-seed{self.seed}{'-validation' if rate else ''}"

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps after which the model is saved in a folder; 0 is the untrained model."""
        if self.n_checkpoints <= 1:
            return [0, self.n_steps][: 2 * self.n_checkpoints]
        factor = (self.n_steps / self.first_checkpoint) ** (1 / (self.n_checkpoints - 1))
        return [0, *sorted({round(self.first_checkpoint * factor**i) for i in range(self.n_checkpoints)})]

    def build(self) -> PreTrainedModel:
        """A fresh model. The width of the MLPs is chosen so that every model has as many parameters as CRAM."""
        make = {
            "cram": self._cram,
            "llama": self._llama,
            "gpt2": self._gpt2,
            "hybrid": lambda width: self._cram(width, self._every_eighth(4)),
            "hybrid-first": lambda width: self._cram(width, self._every_eighth(0)),
            "dense": lambda width: self._cram(width, "always"),
            "recurrent": lambda width: self._cram(width, "never"),
        }[self.model]
        with torch.device("meta"):
            wanted = self._cram(4 * self.d_model).num_parameters()
            narrow, wide = (make(width).num_parameters() for width in (64, 128))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return make(64 + round((wanted - narrow) / (wide - narrow) * 64))

    def _every_eighth(self, first: int) -> list[str]:
        """Routers of a model in which every eighth layer always reads and the others never do."""
        return ["always" if i % 8 == first else "never" for i in range(self.n_layers)]

    def _cram(self, width: int, router: str | list[str] = "benefit") -> PreTrainedModel:
        return CRAMForCausalLM(
            CRAMForCausalLMConfig(**self._sizes(width), memory_capacity=None, router=router, read_price=self.read_price)
        )

    def _llama(self, width: int) -> PreTrainedModel:
        return LlamaForCausalLM(LlamaConfig(**self._sizes(width), tie_word_embeddings=True))

    def _gpt2(self, width: int) -> PreTrainedModel:
        config = GPT2Config(
            vocab_size=self.vocab_size, n_positions=self.context, n_embd=self.d_model, n_layer=self.n_layers,
            n_head=self.n_heads, n_inner=width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def _sizes(self, width: int) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": width,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
        }
