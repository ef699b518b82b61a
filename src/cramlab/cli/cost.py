"""`cramlab cost`: where a trained model's compute goes, and the length below which its mixer does not pay."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from cramlab.baselines import TransformerConfig
from cramlab.memory import CRAMLayer
from cramlab.memory.cost import break_even_length
from cramlab.mixer import Cost, Mixer, Routing
from cramlab.model import SequenceModel
from cramlab.training.evaluate import split_batches
from cramlab.training.load import load_run
from cramlab.training.run import RunConfig


class Shares(NamedTuple):
    """Of a layer's tokens: how many are read and how many written, 0 to 1."""

    read_frac: float
    write_frac: float


class Measured(NamedTuple):
    """Shares by the rule of decoding, and in a training step, which audits that rule."""

    decoding: Shares
    training: Shares


def print_cost(folder: Path, console: Console | None = None) -> None:
    """Prints the cost of every layer at the run's length, from shares measured on its validation split."""
    console = console or Console()
    config, model = load_run(folder)
    seq_len = config.task_at(config.training.stages[-1]).seq_len
    table = Table("layer", "part", "FLOPs a token", "of the model")
    control = TransformerConfig(n_heads=1).build(config.model.d_model)  # heads do not change the count
    around, mlps = surroundings(model)
    rows: list[tuple[str, str, float]] = []
    for i, (block, shares) in enumerate(zip(model.blocks, measured_shares(config, model), strict=True)):
        cost = mixer_cost(block.mixer, seq_len, shares.decoding)
        parts = cost.parts or {"projections": cost.projection_flops, "reads": cost.read_flops}
        rows += [(str(i), part, flops / seq_len) for part, flops in parts.items()]
        rows.append((str(i), "MLP", mlps[i]))
        console.print(f"layer {i}: " + "\n  ".join(_of_layer(block.mixer, mlps[i], control, shares, seq_len)))
    rows.append(("", "embedding and heads", around))
    total = sum(flops for _, _, flops in rows)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        layer, part, flops = row
        last = following is None or following[0] != layer
        table.add_row(layer, part, f"{flops:,.0f}", f"{flops / total:.1%}", end_section=last)
    table.add_row("", "all", f"{total:,.0f}", "100%", style="bold")
    console.print(table)


def _of_layer(mixer: Mixer, mlp: float, control: Mixer, shares: Measured, seq_len: int) -> list[str]:
    """What is to be said of a layer with this mixer, an MLP of so many FLOPs a token, and that control; in lines."""
    by_rule, training = shares
    cost, theirs = mixer_cost(mixer, seq_len, by_rule), control.cost(seq_len).flops
    lines = [f"{by_rule.read_frac:.2%} of the tokens read, {by_rule.write_frac:.2%} written"]
    lines.append(f"state {cost.state_bytes:,} bytes, parameters {cost.parameter_bytes:,} bytes")
    if isinstance(mixer, CRAMLayer):
        flops = mixer.cost(seq_len, **training._asdict(), training=True).flops / seq_len
        lines.append(f"training step: {flops:,.0f} FLOPs a token, without its second pass")
        lines.append(f"  with audits: {training.read_frac:.2%} read, {training.write_frac:.2%} written")
    with_mlp = (theirs + mlp * seq_len) / (cost.flops + mlp * seq_len)
    lines.append(f"full attention of this width costs {theirs / cost.flops:.2f}x as much at {seq_len:,} tokens")
    lines.append(f"  with the MLP that both have, {with_mlp:.2f}x")
    length = break_even_length(lambda n: mixer_cost(mixer, n, by_rule).flops, lambda n: control.cost(n).flops)
    lines.append("it never pays" if length is None else f"it does not pay below {length:,} tokens (by FLOPs)")
    return lines


def surroundings(model: SequenceModel) -> tuple[float, list[float]]:
    """FLOPs a token of what stands around the mixers: embedding and heads together, and the MLP of each layer."""

    def products(*modules: nn.Module) -> float:
        linear = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
        return float(sum(2 * part.weight.numel() for part in linear))

    mlps = [products(block.mlp_in, block.mlp_out) for block in model.blocks]
    return products(model.embedding, model.level_head, model.answer_head), mlps


def mixer_cost(mixer: Mixer, seq_len: int, shares: Shares) -> Cost:
    """Of a forward pass at given shares."""
    if isinstance(mixer, CRAMLayer):
        return mixer.cost(seq_len, **shares._asdict())
    return mixer.cost(seq_len, read_frac=shares.read_frac)


@torch.no_grad()
def measured_shares(config: RunConfig, model: SequenceModel) -> list[Measured]:
    """One a layer, over the validation split at the run's own length; what training adds is its expectation."""
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
    found = []
    for i, block in enumerate(model.blocks):
        by_rule = Shares(read[i] / n_tokens, written[i] / n_tokens)
        reads, writes = by_rule
        if isinstance(block.mixer, CRAMLayer):
            if block.mixer.config.router.name == "benefit":  # a layer is audited when its turn comes
                reads += audited[i] / n_tokens / len(model.blocks)
            writes += (1 - writes) * block.mixer.config.episodic.write_audit_frac  # 1 where no gate decides
        found.append(Measured(by_rule, Shares(reads, writes)))
    return found
