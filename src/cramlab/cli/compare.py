"""The `try` subcommand, which shows original and consolidated model side by side."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cramlab.cli.arguments import model_of, temperature, whole
from cramlab.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from cramlab.consolidation.trial import Continued, Trial


# Style of a token by the share of layers that read for it, at most.
_STYLES = ((0.0, ""), (1 / 3, "cyan"), (2 / 3, "bold cyan"), (1.0, "bold reverse cyan"))


def add_try(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "try",
        help="continue a prompt with a model and its consolidation, side by side",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Continues a prompt with the original model and with the consolidated one, and prints both texts,\n"
        "which layers read for each token, and the time of a token. Changes no file.",
        epilog="examples:\n"
        "  cramlab try glassllm runs/glass\n"
        '  cramlab try my/llama runs/llama "def parse(text):" --tokens 100\n'
        '  cramlab try my/llama user/less "$(cat report.txt)" --temperature 0.7 --seed 1',
    )
    parser.add_argument("model", type=model_of("MODEL"), metavar="MODEL", help="as for cramlab consolidate")
    parser.add_argument("folder", metavar="DIR", help="folder of its consolidation, or a repository of the hub")
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="text to continue (default: three quarters of the folder's sample)"
    )
    parser.add_argument(
        "--tokens", type=whole("--tokens", 1, 2**20), default=40, metavar="N", help="new tokens (default: 40)"
    )
    parser.add_argument(
        "--temperature", type=temperature("--temperature"), default=0.0, metavar="T",
        help="temperature of sampling; 0 takes the most probable token (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=whole("--seed", 0, 2**32 - 1), default=0, metavar="I", help="seed of sampling (default: 0)"
    )
    parser.add_argument(
        "--threads", type=whole("--threads", 1, 1024), metavar="N", help="CPU threads (default: torch's)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load weights stored as pickles, which can run code"
    )
    parser.set_defaults(command=_try)


def _try(args: argparse.Namespace) -> None:
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("PROMPT is empty; give a text, or leave it out for the folder's sample")
    import torch
    from rich.console import Console

    from cramlab.consolidation.hub import folder_named
    from cramlab.consolidation.trial import tried
    from cramlab.hf.loading import device_named, load

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = device_named(args.device)
    folder = folder_named(args.folder)
    pretrained = load(args.model, allow_pickle=args.allow_pickle)
    pretrained.model.to(device)
    trial = tried(
        pretrained, Path(folder), args.prompt, n_tokens=args.tokens, temperature=args.temperature, seed=args.seed
    )
    console = Console()
    if not console.is_terminal:
        print("\n".join(_lines(trial)))
        return
    console.print(_texts(trial), _layers(trial))


def _lines(trial: Trial) -> list[str]:
    """Everything as plain lines."""
    lines = [f"prompt: {trial.n_prompt} tokens, {trial.n_far} with far keys"]
    for name, made in (("original", trial.original), ("consolidated", trial.consolidated)):
        lines += [f"{name}: {_numbers(made)}", *(f"  {line}" for line in _shown(made.text).splitlines())]
    n_reads = trial.reads.sum(0).tolist()
    lines.append(f"layers that read, of {len(trial.layers)}, by new token: {' '.join(map(str, n_reads))}")
    for layer, prompt, new in _shares(trial):
        lines.append(f"layer {layer}: read for {prompt} of the prompt's far tokens, {new} of the new ones")
    return lines


def _numbers(made: Continued) -> str:
    """Number of tokens and times of a continuation."""
    said = f"{len(made.pieces)} tokens; prompt and first token {made.prompt_ms:,.1f} ms"
    return said + (f", then {statistics.median(made.token_ms):,.2f} ms a token (median)" if made.token_ms else "")


def _shares(trial: Trial) -> list[tuple[int, str, str]]:
    """Index of each layer, and the shares of the prompt's and of the new tokens for which it read."""
    prompt = [f"{share:.0%}" if trial.n_far else "-" for share in trial.prompt_reads.tolist()]
    new = [f"{share:.0%}" for share in trial.reads.double().mean(1).tolist()]
    return list(zip(trial.layers, prompt, new, strict=True))


def _shown(text: str) -> str:
    """Text without characters that steer a terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _texts(trial: Trial) -> Table:
    """Both texts side by side; the more layers read for a token, the stronger it stands out."""
    from rich.table import Table
    from rich.text import Text

    coloured = Text()
    for piece, n_reads in zip(trial.consolidated.pieces, trial.reads.sum(0).tolist(), strict=True):
        share = n_reads / len(trial.layers)
        style = next(style for most, style in _STYLES if share <= most)
        coloured.append(_shown(piece), style=style)
    title = f"after {trial.n_prompt} tokens; colour: layers that read"
    table = Table("original", "consolidated", title=title, expand=True)
    table.add_row(Text(_shown(trial.original.text)), coloured)
    table.add_section()
    table.add_row(_numbers(trial.original), _numbers(trial.consolidated))
    return table


def _layers(trial: Trial) -> Table:
    """Which layers read for which new token."""
    from rich.table import Table

    table = Table("layer", "prompt", "new tokens", "by new token", title="far reads made")
    for (layer, prompt, new), reads in zip(_shares(trial), trial.reads.tolist(), strict=True):
        table.add_row(str(layer), prompt, new, "".join("#" if read else "." for read in reads))
    return table
