"""The `score` subcommand: a model trained anywhere, judged by its answers to exported sequences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cramlab.cli.arguments import existing, folder_of
from cramlab.errors import UsageError


def add_score(commands: Any) -> None:
    """Adds the subcommand `score`."""
    parser = commands.add_parser(
        "score",
        help="score answers of a model trained anywhere",
        description="Compares the answers of a model trained anywhere with exported sequences (cramlab.tasks.export), "
        "prints its line for the leaderboard and writes OUT/NAME.json. The predictions are an .npz file with the "
        "array answer (sequences, tokens) and, if known, read (bool, the same shape), n_train_tokens and state_bytes.",
        epilog="example: cramlab score predictions.npz --data test.npz --name my-model --out results/scores",
    )
    parser.add_argument("predictions", type=existing("PREDICTIONS"), metavar="PREDICTIONS.npz", help="the answers")
    parser.add_argument(
        "--data", type=existing("--data"), required=True, metavar="DATA.npz",
        help="the exported sequences, with their datasheet beside them",
    )  # fmt: skip
    parser.add_argument("--name", required=True, type=_name, metavar="NAME", help="name of the model")
    parser.add_argument("--out", type=folder_of("--out"), required=True, metavar="DIR", help="folder of the document")
    parser.set_defaults(command=_score)


def _name(text: str) -> str:
    if not text or not all(c.isalnum() or c in "-_." for c in text) or text.startswith("."):
        raise UsageError(f'--name "{text}" is no name of a file; use letters, digits, "-", "_" and "."')
    return text


def _score(args: argparse.Namespace) -> None:
    from cramlab.files import write_json
    from cramlab.tasks.score import score_predictions

    path: Path = args.out / f"{args.name}.json"
    if path.exists():
        raise UsageError(f"{path} exists already; choose another --name or --out")
    document = score_predictions(args.predictions, args.data, name=args.name)
    write_json(path, document)
    metrics = document["metrics"]
    accuracy = metrics["retrieval_acc"]
    right = "nothing is asked" if accuracy is None else f"accuracy {accuracy:.4f}"
    reads = _reads(metrics["attention_frac"], document["oracle"]["attention_frac"])
    print(f"{document['task']}, {args.name}: {right}, {reads}; {path}")


def _reads(share: float | None, least: float) -> str:
    """Reads over the least, or the share itself where nothing need be read."""
    if share is None:
        return "reads not given"
    return f"{share / least:.2f} x the least reads" if least else f"{share:.4f} of the tokens read, the least is none"
