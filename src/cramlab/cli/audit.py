"""The `audit` subcommand."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cramlab.cli.arguments import TEXTS, add_text, existing, folder_of, model_of, text_of, whole
from cramlab.cli.settings import check_fields, help_text
from cramlab.errors import AuditError
from cramlab.files import finished

if TYPE_CHECKING:
    from cramlab.auditing import AuditConfig, AuditResult


def add_audit(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "audit",
        help="measure which attention of a pretrained model is predictable, and which is removable",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fits linear probes that predict the output of each attention sub-layer and head, and measures\n"
        "the loss when they replace it. Writes DIR/audit.json and DIR/audit.html. --resume continues unfinished work.\n"
        + TEXTS,
        epilog=help_text(
            "audit",
            "cramlab audit glassllm --text stdlib --out runs/glass",
            "cramlab audit my/llama --text book.txt --out runs/book",
            "cramlab audit my/llama --text chats.jsonl --text 'notes/**/*.md' --out runs/mine",
            "cramlab audit gpt2 --text my/folder --out runs/gpt2 --set context=1024",
            "cramlab audit --checkpoints runs/pretrain --text stdlib --out runs/c2",
        ),
    )
    parser.add_argument(
        "model", type=model_of("MODEL"), metavar="MODEL", nargs="?",
        help="smollm2 or glassllm (packaged), a local folder, or a hub name",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoints", type=existing("--checkpoints"), metavar="DIR", help="audit every checkpoint under DIR instead"
    )
    add_text(parser, "text to audit the model on")
    parser.add_argument(
        "--other-text",
        type=text_of("--other-text", "none"),
        default="prose",
        metavar="TEXT",
        help="text of another domain (default: prose), or none",
    )
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the result")
    parser.add_argument("--layers", metavar="I,J,...", help="layers to audit, from 0 (default: all)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens for fitting probes (default: 100000)")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="tokens per forward pass (default: 1024)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="change a setting, see below; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=whole("--threads", 1, 1024), metavar="N", help="CPU threads (default: torch's)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda; needs float64")
    parser.add_argument("--no-controls", action="store_true", help="do not audit the planted model and random weights")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load weights stored as pickles, which can run code"
    )
    parser.add_argument("--resume", action="store_true", help="continue an unfinished audit, keep a finished one")
    parser.set_defaults(command=_audit)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `AuditConfig` that the flags set."""
    if args.layers is not None and not re.fullmatch(r"\d+(,\d+)*", args.layers):
        raise AuditError(f'--layers "{args.layers}" is not a list of layer numbers, as in 0,5,11')
    from cramlab.auditing import AuditConfig
    from cramlab.config import assigned

    flags = {"fit_tokens": args.tokens, "batch_tokens": args.batch_tokens, "layers": args.layers}
    return assigned(AuditConfig(), [*(f"{n}={v}" for n, v in flags.items() if v is not None), *args.overrides])


def _audit(args: argparse.Namespace) -> None:
    """One model, or all checkpoints of a training run."""
    if (args.model is None) == (args.checkpoints is None):
        raise AuditError("give either MODEL or --checkpoints DIR")
    check_fields("audit", args.overrides)
    if args.checkpoints is None:
        finished(args.out / "audit.json", resume=args.resume)
    import torch

    from cramlab.auditing import AuditConfig
    from cramlab.cli.display import Display
    from cramlab.config import replaced
    from cramlab.pretrained import audit

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.checkpoints is not None:
        _over_training(args, replaced(AuditConfig(), _settings(args)))
        return
    with Display() as display:
        result = audit(
            args.model,
            [Path(text) for text in args.text],
            args.out,
            text_field=args.text_field,
            chat=args.chat,
            other_text=None if args.other_text == "none" else args.other_text,
            controls=not args.no_controls,
            resume=args.resume,
            device=args.device,
            allow_pickle=args.allow_pickle,
            progress=display,
            log=display.say,
            **_settings(args),
        )
    _print(result)
    print(f"record: {args.out / 'audit.json'}\nreport: {args.out / 'audit.html'}")


def _over_training(args: argparse.Namespace, config: AuditConfig) -> None:
    """Audits all checkpoints; finished audits are kept in the folder and reused with --resume."""
    import torch

    from cramlab.auditing import over_training, read_corpus
    from cramlab.files import only_process_in, write_text
    from cramlab.hf.loading import device_named
    from cramlab.report.audit_page import render_over_training
    from cramlab.report.intervals import estimate

    path = args.out / over_training.FILE
    corpus = read_corpus(*args.text, field=args.text_field).written(None, args.chat)
    if args.out.exists() and any(args.out.iterdir()) and not args.resume:
        raise FileExistsError(f"{args.out} is not empty; continue with --resume, or choose another --out")
    data = over_training.audit_checkpoints(
        over_training.find_checkpoints(args.checkpoints), corpus, config,
        allow_pickle=args.allow_pickle, device=device_named(args.device, torch.float64), out=args.out, log=print,
    )  # fmt: skip
    with only_process_in(args.out):
        over_training.write(path, data)
        write_text(args.out / "over_training.html", render_over_training(data))
    for trend in data["trends"]:
        steps, r2 = f"from step {trend['from_step']} to {trend['to_step']}", trend["r2"]
        print(f"{trend['run']}: centred R2 {r2['direction']} {steps}: {estimate(r2['change'], '+.3f')}")
    print(f"record: {path}\nreport: {args.out / 'over_training.html'}")


def _print(result: AuditResult) -> None:
    """Prints the main figures."""
    from rich.console import Console
    from rich.table import Table

    from cramlab.report.intervals import estimate

    data = result.data
    table = Table(
        "layer", "R", "R of the mean", "centred R2", "nats: probe", "mean", "zero", title=data["model"]["name"]
    )

    means = result.layers("r", "mean")
    for i, layer in enumerate(data["model"]["layers"]):
        row = None if data["loss"] is None else data["loss"]["alone"][i]
        nats = ["-" if row is None else estimate(row[kind]) for kind in ("probe", "mean", "zero")]
        shares = (result.layers("r")[i], means[i], result.layers("r2")[i])
        table.add_row(str(layer), *map(estimate, shares), *nats)
    table.add_section()
    overall = (result.overall("r"), result.overall("r", "mean"), result.overall("r2"))
    table.add_row("mean", *map(estimate, overall))
    Console().print(table)
    if "verdict" in data and (both := data["verdict"]["predictable_not_removable"]):
        print(f"predictable, but not removable: layers {', '.join(map(str, both))}")
