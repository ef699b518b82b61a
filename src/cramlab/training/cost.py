"""Cost of a trained model in FLOPs, from the shares of tokens that it reads and writes on its validation split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from cramlab.baselines import TransformerConfig
from cramlab.memory import CRAMLayer
from cramlab.memory.cost import break_even_length
from cramlab.mixer import Cost, Mixer, Routing
from cramlab.model import SequenceModel
from cramlab.training.evaluate import split_batches
from cramlab.training.run import RunConfig


class Shares(NamedTuple):
    """Shares of a layer's tokens that are read and written, 0 to 1."""

    read_frac: float
    write_frac: float


class Measured(NamedTuple):
    """Shares under the routing rule of decoding, and in a training step, which adds audits."""

    decoding: Shares
    training: Shares


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of one layer.

    Attributes:
        shares: measured shares of tokens.
        parts: forward FLOPs per token of the mixer, by part.
        mlp: forward FLOPs per token of the MLP.
        state_bytes: size of the state that decoding carries from token to token, bytes.
        parameter_bytes: size of the mixer's parameters, bytes.
        training_flops: FLOPs per token of the mixer in a training step, without the pass without reads; None where
            the mixer does not say.
        attention_ratio: FLOPs of full attention of this width divided by those of the mixer.
        attention_ratio_with_mlp: the same with the MLP's FLOPs added to both.
        break_even: smallest sequence length at which the mixer costs no more FLOPs than full attention; None: none.
    """

    shares: Measured
    parts: Mapping[str, float]
    mlp: float
    state_bytes: int
    parameter_bytes: int
    training_flops: float | None
    attention_ratio: float
    attention_ratio_with_mlp: float
    break_even: int | None


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Cost of a model on sequences of one length.

    Attributes:
        seq_len: tokens per sequence.
        layers: cost of every layer.
        embedding_and_heads: forward FLOPs per token of embedding and heads.
    """

    seq_len: int
    layers: tuple[LayerCost, ...]
    embedding_and_heads: float


def model_cost(config: RunConfig, model: SequenceModel) -> ModelCost:
    """Measures reads and writes of a run's model on its validation split, and computes the cost that follows."""
    seq_len = config.task_at(config.training.stages[-1]).seq_len
    embedding_and_heads, mlps = surroundings(model)
    attention = TransformerConfig(n_heads=1).build(config.model.d_model)  # the number of heads does not change FLOPs
    layers = tuple(
        _layer_cost(block.mixer, mlp, attention, shares, seq_len)
        for block, mlp, shares in zip(model.blocks, mlps, measured_shares(config, model), strict=True)
    )
    return ModelCost(seq_len=seq_len, layers=layers, embedding_and_heads=embedding_and_heads)


def _layer_cost(mixer: Mixer, mlp: float, attention: Mixer, shares: Measured, seq_len: int) -> LayerCost:
    cost, full = mixer_cost(mixer, seq_len, shares.decoding), attention.cost(seq_len).flops
    parts = cost.parts or {"projections": cost.projection_flops, "reads": cost.read_flops}
    training = None
    if isinstance(mixer, CRAMLayer):
        training = mixer.cost(seq_len, **shares.training._asdict(), training=True).flops / seq_len
    return LayerCost(
        shares=shares,
        parts={name: flops / seq_len for name, flops in parts.items()},
        mlp=mlp,
        state_bytes=cost.state_bytes,
        parameter_bytes=cost.parameter_bytes,
        training_flops=training,
        attention_ratio=full / cost.flops,
        attention_ratio_with_mlp=(full + mlp * seq_len) / (cost.flops + mlp * seq_len),
        break_even=break_even_length(
            lambda n: mixer_cost(mixer, n, shares.decoding).flops, lambda n: attention.cost(n).flops
        ),
    )


def surroundings(model: SequenceModel) -> tuple[float, list[float]]:
    """Returns the FLOPs per token around the mixers: of embedding and heads together, and of each layer's MLP."""

    def products(*modules: nn.Module) -> float:
        linear = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
        return float(sum(2 * part.weight.numel() for part in linear))

    mlps = [products(block.mlp_in, block.mlp_out) for block in model.blocks]
    return products(model.embedding, model.level_head, model.answer_head), mlps


def mixer_cost(mixer: Mixer, seq_len: int, shares: Shares) -> Cost:
    """Returns the cost of a forward pass on one sequence at the given shares."""
    if isinstance(mixer, CRAMLayer):
        return mixer.cost(seq_len, **shares._asdict())
    return mixer.cost(seq_len, read_frac=shares.read_frac)


@torch.no_grad()
def measured_shares(config: RunConfig, model: SequenceModel) -> list[Measured]:
    """Measures the shares of every layer on the validation split, at the length of the run's last stage.

    The shares in training are expectations: audits are counted by their probability.
    """
    model.eval()
    training = config.training
    n_tokens, read, audited, written = 0, *([0.0] * len(model.blocks) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for batch in split_batches(config, "validation"):
        routing = Routing(oracle_reads=batch.oracle_reads, generator=generator)
        n_tokens += batch.n_tokens
        chance = torch.where(batch.retrieval_mask, training.audit_supervised_frac, training.audit_frac)
        for i, trace in enumerate(model(batch, routing=routing).traces):
            read[i] += int((trace.scored & batch.valid).sum())
            audited[i] += float((chance * (~trace.scored & batch.valid)).sum())
            written[i] += batch.n_tokens if trace.written is None else int(trace.written.sum())
    measured = []
    for i, block in enumerate(model.blocks):
        decoding = Shares(read[i] / n_tokens, written[i] / n_tokens)
        reads, writes = decoding
        if isinstance(block.mixer, CRAMLayer):
            if block.mixer.config.router.name == "benefit":  # a step audits one layer, in turn
                reads += audited[i] / n_tokens / len(model.blocks)
            writes += (1 - writes) * block.mixer.config.episodic.write_audit_frac  # writes is 1 without a write gate
        measured.append(Measured(decoding, Shares(reads, writes)))
    return measured
