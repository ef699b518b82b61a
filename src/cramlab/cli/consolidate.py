"""The `consolidate` subcommand."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from cramlab.cli.arguments import folder_of, path_of, positive, text_of, whole
from cramlab.cli.display import Display
from cramlab.config import assigned
from cramlab.consolidation.config import RetrofitConfig
from cramlab.pretrained import consolidate


def add_consolidate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "consolidate",
        help="let a pretrained model skip far attention, at a stated cost",
        description="Learns which reads of the far context a pretrained language model can do without, small adapters "
        "that answer instead, and a threshold that keeps the expected increase of the loss within --max-loss-increase "
        "with confidence 1 - delta. Writes a few MB into DIR; the model's weights are not touched. "
        "cramlab.load_consolidated(MODEL, DIR) puts both together.",
        epilog="examples: cramlab consolidate glassllm --text stdlib --max-loss-increase 0.05 --out runs/glass "
        "--set context=128 --set window=16 | cramlab consolidate my/llama --text my/texts --max-loss-increase 0.02 "
        "--out runs/llama --set context=4096 | cramlab consolidate my/llama --text my/texts --from runs/llama "
        "--max-loss-increase 0.01 --out runs/llama-safer",
    )
    parser.add_argument("model", metavar="MODEL", help="smollm2 or glassllm (packaged), a local folder, or a hub name")
    parser.add_argument(
        "--text",
        type=text_of("--text"),
        required=True,
        metavar="TEXT",
        help="stdlib, prose, a folder of text files, or a file",
    )
    parser.add_argument(
        "--further-text",
        type=text_of("--further-text"),
        metavar="TEXT",
        help="other text to take gradients from; nothing is measured on it",
    )
    parser.add_argument(
        "--from", type=path_of("--from"), metavar="FOLDER", dest="start",
        help="learn nothing: calibrate what this folder of another consolidation holds for this promise and text",
    )  # fmt: skip
    parser.add_argument(
        "--max-loss-increase",
        type=positive("--max-loss-increase", "nats per token"),
        default=0.02,
        metavar="NATS",
        help="promised, per token (default: 0.02)",
    )
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the result")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="change a field of RetrofitConfig, as in window=128; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=whole("--threads", 1, 1024), metavar="N", help="CPU threads (default: torch's)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load weights stored as pickles, which can run code"
    )
    parser.add_argument("--resume", action="store_true", help="continue unfinished work, keep what is finished")
    parser.set_defaults(command=_consolidate)


def _consolidate(args: argparse.Namespace) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with Display() as display:
        record = consolidate(
            args.model,
            args.text,
            args.out,
            max_loss_increase=args.max_loss_increase,
            further_text=args.further_text,
            start=args.start,
            resume=args.resume,
            device=args.device,
            allow_pickle=args.allow_pickle,
            progress=display,
            **assigned(RetrofitConfig(), args.overrides),
        )
    _print(record)
    print(f"folder: {args.out}; in Python: cramlab.load_consolidated({args.model!r}, {str(args.out)!r})")


def _print(record: dict) -> None:
    """What was tested, what was chosen, and what it did on the test documents."""
    promise, test = record["promise"], record["test"]
    table = Table("far reads skipped", "increase", "could be promised", "p", title=record["name"])
    for row in record["tested"]:
        table.add_row(f"{row['skipped_frac']:.0%}", f"{row['mean']:.4f}", f"{row['upper_bound']:.4f}",
                      f"{row['p_value']:.3g}")  # fmt: skip
    Console().print(table)
    print(
        f"promised: at most {promise['increase']:g} nats per token, confidence {1 - promise['delta']:g}; "
        f"on {test['documents']} test documents {test['increase']:+.4f} with {test['skipped_frac']:.1%} of far reads "
        f"skipped, {test['pairs_frac']:.1%} of causal pairs scored"
    )
    if n_copies := sum(record.get("copies", {}).values()):
        print(f"{n_copies} documents were left out as copies of others, exact or near")
