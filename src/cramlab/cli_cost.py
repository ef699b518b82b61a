"""`cramlab cost`: where a trained model's compute goes, and the length below which its mixer does not pay."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from cramlab.baselines import TransformerConfig
from cramlab.memory import CRAMLayer
from cramlab.memory.cost import break_even_length
from cramlab.mixer import Cost, Mixer, Routing
from cramlab.model import SequenceModel
from cramlab.training.evaluate import split_batches
from cramlab.training.load import load_run
from cramlab.training.run import RunConfig


class Shares(NamedTuple):
    """Of a layer's tokens, measured: how many were read and how many written, 0 to 1."""

    read_frac: float
    write_frac: float


def print_cost(folder: Path, console: Console | None = None) -> None:
    """Prints the cost of every layer at the run's length, from shares measured on its validation split."""
    console = console or Console()
    config, model = load_run(folder)
    seq_len = config.task_at(config.training.stages[-1]).seq_len
    table = Table("layer", "part", "FLOPs a token", "of the layer")
    for i, (block, shares) in enumerate(zip(model.blocks, measured_shares(config, model), strict=True)):
        cost = mixer_cost(block.mixer, seq_len, shares)
        for part, flops in (cost.parts or {"projections": cost.projection_flops, "reads": cost.read_flops}).items():
            table.add_row(str(i), part, f"{flops / seq_len:,.0f}", f"{flops / cost.flops:.1%}")
        table.add_row(str(i), "all", f"{cost.flops / seq_len:,.0f}", "100%", style="bold")
        table.add_section()
        control = TransformerConfig(n_heads=_n_heads(block.mixer)).build(config.model.d_model)
        lines = [f"layer {i}: {shares.read_frac:.2%} of the tokens read, {shares.write_frac:.2%} written"]
        lines.append(f"  state {cost.state_bytes:,} bytes, parameters {cost.parameter_bytes:,} bytes")
        if isinstance(block.mixer, CRAMLayer):
            training = block.mixer.cost(seq_len, **shares._asdict(), training=True).flops
            lines.append(f"  training step at these shares: {training / seq_len:,.0f} FLOPs a token")
        ratio = control.cost(seq_len).flops / cost.flops
        lines.append(f"  full attention of this width costs {ratio:.2f}x as much at {seq_len:,} tokens")
        length = break_even_length(
            lambda n, mixer=block.mixer, shares=shares: mixer_cost(mixer, n, shares).flops,
            lambda n, control=control: control.cost(n).flops,
        )
        lines.append("  it never pays" if length is None else f"  it does not pay below {length:,} tokens (by FLOPs)")
        console.print("\n".join(lines))
    console.print(table)


def mixer_cost(mixer: Mixer, seq_len: int, shares: Shares) -> Cost:
    """Of a forward pass at given shares."""
    if isinstance(mixer, CRAMLayer):
        return mixer.cost(seq_len, **shares._asdict())
    return mixer.cost(seq_len, read_frac=shares.read_frac)


@torch.no_grad()
def measured_shares(config: RunConfig, model: SequenceModel) -> list[Shares]:
    """One a layer, by the rule of decoding, over the validation split at the run's own length."""
    model.eval()
    n_tokens, n_scored, n_written = 0, [0] * len(model.blocks), [0] * len(model.blocks)
    generator = torch.Generator().manual_seed(0)
    for batch in split_batches(config, "validation"):
        routing = Routing(oracle_reads=batch.oracle_reads, generator=generator)
        n_tokens += batch.n_tokens
        for i, trace in enumerate(model(batch, routing=routing).traces):
            n_scored[i] += int((trace.scored & batch.valid).sum())
            n_written[i] += batch.n_tokens if trace.written is None else int(trace.written.sum())
    return [Shares(s / n_tokens, w / n_tokens) for s, w in zip(n_scored, n_written, strict=True)]


def _n_heads(mixer: Mixer) -> int:
    """Heads do not change the count; a control must merely be possible."""
    return mixer.config.episodic.n_heads if isinstance(mixer, CRAMLayer) else 1
