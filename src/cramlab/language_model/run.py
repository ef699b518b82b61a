"""What one training run of a language model is: the model, its sizes and how it is trained."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from cramlab.config import ConfigError, Count, CountOrZero, Layers, Name, Positive, Seed, Share, Size, Weight, checked
from cramlab.language_model.llama_with_bigrams import LlamaWithBigrams
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.language_model.text import Part

_WIDE = 256  # width of models whose MLPs can be 32 channels wider or narrower at under 2% of the parameters
ModelName = Literal["cram", "llama", "gpt2"]


@checked("")
class TextRunConfig:
    """A language model and its training.

    The learning rate rises over `warmup_steps` and falls along a cosine to a tenth.

    Attributes:
        model: "cram"; "llama" or "gpt2", with attention.
        arm: name of the model among those it is compared with, and stem of its files; empty: "cram" or the like.
        cram: fields of `CRAMForCausalLMConfig`, for a CRAM model.
        bigram_slots: rows of a table of bigrams, which a CRAM model or a Llama adds to its residual stream before every
            block and has beyond its other parameters; 0: no table.
        window: number of newest tokens that every token attends to, in all layers of a Llama, or in the layers with
            memories of a CRAM model, beside its reads; None: a Llama attends to all tokens, and CRAM has no window.
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
        encoding_frac: largest share of the steps in which every token of a CRAM model reads; then its gates decide.
        least_gain: the encoding phase ends earlier, when loss without reads minus loss with them has stopped growing
            and is at least this, in nats per token; None: it does not.
        read_price: smallest benefit that makes a read worthwhile, in nats; sets the trade-off of gates that learn a
            "decision".
        reads_frac: share of reads, mean over all layers, to which the threshold of other gates is moved; None: the
            threshold stays 0.
        ramp_frac: share of the steps over which the share of reads falls from 1 to `reads_frac`.
        eval_every_steps: steps between two evaluations on held-out text; a stopped run resumes from one of them.
        part: part of the held-out text to evaluate on; "validation" for choices such as the learning rate.
        loss_over: what the loss of the judged reads and of the memories is divided by. "reads": the number of tokens
            that read; "targets": the number of tokens of the batch that are predicted, so that the parts of a batch add
            up to it (as in transformers' Trainer). "targets" is needed where a batch is divided.
        accumulate: parts into which each device divides its sequences of a batch, one after another, to save memory;
            the result does not change.
        devices: number of devices of this machine that share every batch, one process each; the result does not change.
        device: torch device; with several devices, their kind.
        precision: "32", or "bf16": matrix products in bfloat16, weights in 32 bits.
        compile: whether training is compiled; see `compilation.compile_for_training`. Evaluation is not.
        n_checkpoints: models saved in folders of their own after the untrained one, at steps that grow by a constant
            factor; 0: none, not even the untrained one.
        first_checkpoint: step of the first of them.
    """

    model: ModelName = "cram"
    arm: Name = ""
    cram: dict[str, Any] = field(default_factory=dict)
    bigram_slots: CountOrZero = 0
    window: Size | None = None
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
    least_gain: Positive | None = None
    read_price: Weight = 0.01
    reads_frac: Share | None = None
    ramp_frac: Share = 0.1
    eval_every_steps: Count = 100
    part: Part = "test"
    loss_over: Literal["reads", "targets"] = "reads"
    accumulate: Count = 1
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    device: Annotated[str, Field(pattern="^(cpu|cuda|mps|meta)(:[0-9]+)?$")] = "cpu"
    precision: Literal["32", "bf16"] = "32"
    compile: bool = False
    n_checkpoints: Annotated[int, Field(ge=0, le=1000)] = 0
    first_checkpoint: Count = 30

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads = {self.n_heads} must divide d_model = {self.d_model}")
        if self.n_checkpoints and self.first_checkpoint > self.n_steps:
            raise ConfigError(f"first_checkpoint = {self.first_checkpoint} must be at most n_steps = {self.n_steps}")
        if (n_parts := self.devices * self.accumulate) > 1 and self.batch_size % n_parts:
            raise ConfigError(
                f"devices = {self.devices} times accumulate = {self.accumulate} must divide batch_size = "
                f"{self.batch_size}; give batch_size = {n_parts * math.ceil(self.batch_size / n_parts)}"
            )
        if n_parts > 1 and self.loss_over == "reads":
            raise ConfigError(
                f"devices = {self.devices} and accumulate = {self.accumulate} divide a batch, whose parts add up only "
                'to a loss over targets; set loss_over="targets"'
            )
        if self.devices > 1 and self.device not in ("cpu", "cuda"):
            raise ConfigError(f'device = "{self.device}" does not suit devices = {self.devices}; give "cpu" or "cuda"')
        if self.cram and self.model != "cram":
            raise ConfigError(f'cram = {self.cram} does not apply to model = "{self.model}"; leave it out')
        if self.bigram_slots and (self.model == "gpt2" or (self.model == "llama" and self.window)):
            raise ConfigError(
                f"bigram_slots = {self.bigram_slots} does not apply to a GPT-2 or a Llama with a window; leave it out"
            )
        if self.window is not None and self.model == "gpt2":
            raise ConfigError(f'window = {self.window} does not apply to model = "gpt2"; leave it out')
        if self.reads_frac is not None and self.cram.get("gate_learns", "decision") == "decision":
            raise ConfigError(
                f'reads_frac = {self.reads_frac} needs gates with a threshold; set cram.gate_learns="nats"'
            )

    @property
    def name(self) -> str:
        """Stem of the record and folder of the saved models."""
        price = f"-price{self.read_price:g}" if self.model == "cram" and not self.arm else ""
        rate = f"-rate{self.learning_rate:g}-{self.n_steps}-steps" if self.part == "validation" else ""
        return f"{self.arm or self.model}{price}{rate}-seed{self.seed}{'-validation' if rate else ''}"

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps after which the model is saved in a folder; 0 is the untrained model."""
        if self.n_checkpoints <= 1:
            return [0, self.n_steps][: 2 * self.n_checkpoints]
        factor = (self.n_steps / self.first_checkpoint) ** (1 / (self.n_checkpoints - 1))
        return [0, *sorted({round(self.first_checkpoint * factor**i) for i in range(self.n_checkpoints)})]

    @property
    def routes(self) -> bool:
        """Whether some tokens of the model read and others do not, once the encoding phase has ended."""
        router = self.cram.get("router", "benefit")
        routers = {router} if isinstance(router, str) else set(router)
        return self.model == "cram" and not routers.isdisjoint(("benefit", "random"))

    def build(self) -> PreTrainedModel:
        """A fresh model. The width of the MLPs is chosen so that every model has as many parameters.

        Their number is that of a CRAM model with leaky integrators and gates in every layer, whose MLPs are four times
        as wide as the model, and with the table of bigrams if there is one.
        """
        make = {"cram": self._cram, "llama": self._llama, "gpt2": self._gpt2}[self.model]
        with torch.device("meta"):
            wanted = self._reference(4 * self.d_model).num_parameters()
            narrow, wide = (make(width).num_parameters() for width in (64, 128))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            width = 64 + round((wanted - narrow) / (wide - narrow) * 64)
            if self.d_model >= _WIDE:  # tensor cores take an uneven width at half the speed
                width = round(width / 64) * 64
            return make(width)

    def _reference(self, width: int) -> PreTrainedModel:
        return CRAMForCausalLM(CRAMForCausalLMConfig(**self._sizes(width), bigram_slots=self.bigram_slots))

    def _cram(self, width: int) -> PreTrainedModel:
        fields = {
            "memory_capacity": None, "read_price": self.read_price, "bigram_slots": self.bigram_slots,
            "window": self.window,
        } | self.cram  # fmt: skip
        return CRAMForCausalLM(CRAMForCausalLMConfig(**self._sizes(width), **fields))

    def _llama(self, width: int) -> PreTrainedModel:
        sizes: dict[str, Any] = self._sizes(width) | {"tie_word_embeddings": True}
        if self.window is not None:  # a Mistral with as many keys as queries is a Llama with a window
            sizes |= {"num_key_value_heads": self.n_heads, "sliding_window": self.window}
            return MistralForCausalLM(MistralConfig(**sizes))
        config = LlamaConfig(**sizes)
        return LlamaWithBigrams(config, self.bigram_slots) if self.bigram_slots else LlamaForCausalLM(config)

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
