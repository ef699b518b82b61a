"""The `consolidate` subcommand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cramlab.cli.arguments import TEXTS, add_text, existing, folder_of, model_of, positive, text_of, whole
from cramlab.cli.settings import check_fields, help_text
from cramlab.files import finished


def add_consolidate(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "consolidate",
        help="let a pretrained model skip far attention within a guaranteed loss increase",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Learns gates that choose which tokens of a pretrained language model attend to far keys, small\n"
        "adapters that answer for the others, and a threshold for which the expected increase of the loss is at most\n"
        "--max-loss-increase with confidence 1 - delta. Writes a few MB and report.html into DIR and changes no\n"
        "weight of the model. cramlab.load_consolidated(MODEL, DIR) loads both; cramlab try MODEL DIR compares them.\n"
        "Sizes that --set does not name follow from the text. What they do to the guarantee, and how long the work\n"
        "takes, is printed before it begins.\n" + TEXTS,
        epilog=help_text(
            "consolidate",
            "cramlab consolidate glassllm --text stdlib --max-loss-increase 0.1 --out runs/glass",
            "cramlab consolidate my/llama --text book.txt --out runs/book",
            "cramlab consolidate my/llama --text chats.jsonl --text 'notes/**/*.md' --out runs/mine",
            "zcat logs.gz | cramlab consolidate my/llama --text - --out runs/logs",
            "cramlab consolidate my/llama --text my/texts --max-loss-increase 0.02 --out runs/llama --set context=4096",
            "cramlab consolidate my/llama --text my/texts --from runs/llama --max-loss-increase 0.01 "
            "--out runs/llama-safer",
        ),
    )
    parser.add_argument(
        "model",
        type=model_of("MODEL"),
        metavar="MODEL",
        help="smollm2 or glassllm (packaged), a folder, a GGUF file, or a hub name",
    )
    add_text(parser, "text of the kind that the model will be used on")
    parser.add_argument(
        "--further-text",
        type=text_of("--further-text"),
        action="append",
        metavar="TEXT",
        help="other text for gradient steps; nothing is measured on it",
    )
    parser.add_argument(
        "--from", type=existing("--from"), metavar="FOLDER", dest="start",
        help="learn nothing: calibrate the gates of this folder for another --max-loss-increase or --text",
    )  # fmt: skip
    parser.add_argument(
        "--max-loss-increase",
        type=positive("--max-loss-increase", "nats per token"),
        default=0.02,
        metavar="NATS",
        help="guaranteed bound on the expected loss increase, nats per token (default: 0.02)",
    )
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the result")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="change a setting, see below; may be repeated",
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
    check_fields("consolidate", args.overrides)
    finished(args.out / "consolidation.json", resume=args.resume)
    import torch

    from cramlab.cli.display import Display
    from cramlab.config import assigned
    from cramlab.consolidation.config import ConsolidationConfig
    from cramlab.pretrained import consolidate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with Display() as display:
        record = consolidate(
            args.model,
            [Path(text) for text in args.text],
            args.out,
            max_loss_increase=args.max_loss_increase,
            further_text=None if args.further_text is None else [Path(text) for text in args.further_text],
            text_field=args.text_field,
            chat=args.chat,
            start=args.start,
            resume=args.resume,
            device=args.device,
            allow_pickle=args.allow_pickle,
            progress=display,
            log=display.say,
            **assigned(ConsolidationConfig(), args.overrides),
        )
    from rich.console import Console

    from cramlab.consolidation.in_use import load_in_use
    from cramlab.report.consolidation_page import PAGE
    from cramlab.report.consolidation_table import consolidation_table

    in_use = load_in_use(args.out, record)
    Console().print(consolidation_table(record, in_use))
    guarantee, test, n_layers = record["promise"], record["test"], record["model"]["n_layers"]
    over = "" if len(record["ranks"]) == n_layers else f" (in layers {', '.join(record['ranks'])} of {n_layers})"
    print(
        f"guaranteed: at most +{guarantee['increase']:g} nats per token with confidence {1 - guarantee['delta']:g}; "
        f"measured on {test['documents']} test documents: {test['increase']:+.4f}, with {test['skipped_frac']:.1%} of "
        f"far reads skipped{over} and {test['pairs_frac']:.1%} of causal pairs scored"
    )
    if weaker := record.get("calibrated_on", {}).get("weaker"):
        print(weaker)
    print(f"page: {args.out / PAGE}")
    print(f"folder: {args.out}; in Python: cramlab.load_consolidated({args.model!r}, {str(args.out)!r})")
