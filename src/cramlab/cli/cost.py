"""The `cost` subcommand: FLOPs of a trained model, and the length from which its mixer is cheaper than attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cramlab.training.cost import LayerCost, ModelCost


def print_cost(folder: Path, console: Console | None = None) -> None:
    """Prints the cost of every layer of a run's model, at shares measured on its validation split."""
    from rich.console import Console

    from cramlab.training.cost import model_cost
    from cramlab.training.load import load_run

    console = console or Console()
    cost = model_cost(*load_run(folder))
    for i, layer in enumerate(cost.layers):
        console.print(f"layer {i}: " + "\n  ".join(_lines(layer, cost.seq_len)))
    _print_parts(cost, console)


def _lines(layer: LayerCost, seq_len: int) -> list[str]:
    """The findings on one layer."""
    decoding, training = layer.shares
    lines = [
        f"reads at {decoding.read_frac:.2%} of the tokens, writes {decoding.write_frac:.2%}",
        f"state {layer.state_bytes:,} bytes, parameters {layer.parameter_bytes:,} bytes",
    ]
    if layer.training_flops is not None:
        lines += [
            f"training step: {layer.training_flops:,.0f} FLOPs per token, not counting the pass without reads",
            f"  including audits: reads at {training.read_frac:.2%}, writes {training.write_frac:.2%}",
        ]
    lines += [
        f"full attention of this width costs {layer.attention_ratio:.2f} times as much at {seq_len:,} tokens",
        f"  including the MLP in both: {layer.attention_ratio_with_mlp:.2f} times",
    ]
    if layer.break_even is None:
        return [*lines, "never cheaper than full attention (FLOPs)"]
    return [*lines, f"cheaper than full attention from {layer.break_even:,} tokens on (FLOPs)"]


def _print_parts(cost: ModelCost, console: Console) -> None:
    """Prints the table of forward FLOPs by layer and part."""
    from rich.table import Table

    rows = [(str(i), {**layer.parts, "MLP": layer.mlp}) for i, layer in enumerate(cost.layers)]
    rows.append(("", {"embedding and heads": cost.embedding_and_heads}))
    total = sum(sum(parts.values()) for _, parts in rows)
    table = Table("layer", "part", "FLOPs per token", "share of the model")
    for layer, parts in rows:
        for part, flops in parts.items():
            table.add_row(layer, part, f"{flops:,.0f}", f"{flops / total:.1%}")
        table.add_section()
    table.add_row("", "all", f"{total:,.0f}", "100%", style="bold")
    console.print(table)
