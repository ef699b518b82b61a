"""Times consolidated models in batches on a GPU: the kernel, a step of a model, and whole answers.

    python -m benchmarks.serving --out results/bench/serving --seconds 500
    python -m benchmarks.serving --out results/bench/serving --folder runs/smollm2-p05 --rows 'step-smollm2-*'

A row is one level, model, context and batch, such as step-1b-32768-b8; `compiled-...` is the same step compiled by
torch.compile instead of recorded as a CUDA graph. Rows that have a record are kept; the others are taken in the order
of `ROWS` until the time is over, each written when it is done. Models of a shape (1b, 1b-mha, 8b) have random weights
and gates that are forced open at random, so they say nothing but speed; smollm2 wants --folder. All ways of a row take
turns. The first way of a row is the original with our split-K kernel; `reproduction.serving_goals` compares with the
fastest original of a row, whichever that is.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import serving_models, serving_ways
from cramlab import records
from cramlab.files import write_json

BATCHES, CONTEXTS = (1, 4, 8, 16), (2048, 4096, 8192, 16384, 32768, 65536)
_FIRST = (  # these answer goals
    "kernel-1b-32768-b8", "kernel-8b-32768-b8", "step-smollm2-8192-b8", "answer-smollm2-8192-b8",
    "step-1b-32768-b1", "step-1b-32768-b8", "step-1b-65536-b8", "step-8b-32768-b8",
    "step-1b-mha-32768-b1", "step-1b-mha-32768-b8", "step-1b-mha-65536-b8",
    "compiled-1b-32768-b8", "compiled-1b-32768-b1", "compiled-1b-65536-b8", "compiled-8b-32768-b8",
    "compiled-smollm2-8192-b8",
)  # fmt: skip
_GRID = [f"{level}-{n}-b{b}" for level in ("step-1b", "kernel-1b", "step-8b") for n in CONTEXTS for b in BATCHES]
ROWS = list(dict.fromkeys([*_FIRST, *_GRID]))


def main(given: list[str] | None = None) -> int:
    """Makes the rows that have no record, until the time is over; returns 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="one record a row")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="names or patterns of ROWS, or others")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N", help="start no row after")
    parser.add_argument("--repeats", type=int, default=21, metavar="N", help="timed calls of each way (default: 21)")
    parser.add_argument("--read-frac", type=float, default=0.1, metavar="P", help="share of forced reads (0.1)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="consolidation of the pretrained model")
    parser.add_argument("--text", default="stdlib", metavar="TEXT", help="text of its prompts (default: stdlib)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(given)
    if not 0 < args.read_frac <= 1:
        parser.error(f"--read-frac {args.read_frac}: give a share above 0 and at most 1")
    begun, models, n_failed = time.perf_counter(), Models(args), 0
    longest = {"compiled": 90.0, "answer": 60.0}  # seconds of a row: guesses, until one has taken longer
    for name in _asked(args.rows):
        path = args.out / f"{name}.json"
        level, model, context, n_batch = parsed(name)
        left = args.seconds - (time.perf_counter() - begun)
        if path.exists() or left < longest.get(level, 0.0):
            print(f"{name}: {'has a record' if path.exists() else 'no time is left'}", flush=True)
            continue
        if model not in serving_models.SHAPES and args.folder is None:
            print(f"{name}: wants --folder", flush=True)
            continue
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            found = made_row(level, models, model, n_batch, context, args)
        except (serving_ways.DoesNotFit, torch.OutOfMemoryError) as error:
            found = {"left_out": str(error)[:300]}
        except Exception as error:  # an error of one row must not cost the time of the others; it leaves no record
            print(f"{name}: failed with {type(error).__name__}: {str(error)[:500]}", flush=True)
            n_failed += 1
            continue
        seconds = time.perf_counter() - start
        longest[level] = max(longest.get(level, 0.0), seconds)
        row = {"level": level, "model": model, "n_batch": n_batch, "context": context}
        write_json(path, records.header(torch.device(args.device)) | {"kind": "serving"} | row | found)
        print(f"{name}: {shown(found)} ({seconds:.0f} s)", flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
    return 1 if n_failed else 0


class Models:
    """The model of the last row, kept for the next.

    Args:
        args: of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name, self.made = args, "", None

    def __call__(self, name: str) -> serving_models.Made:
        """The model of a name."""
        if name != self.name or self.made is None:
            self.made = None
            gc.collect()
            device = torch.device(self.args.device)
            if name in serving_models.SHAPES:
                made = serving_models.random_model(name, self.args.read_frac, self._shares(), device)
            else:
                made = serving_models.consolidated_model(name, self.args.folder, self.args.text, max(BATCHES), device)
            self.name, self.made = name, made
        return self.made

    def _shares(self) -> list[float] | None:
        """Shares of reads by layer of a real model, from the record of its answers; None without one."""
        for path in sorted(self.args.out.glob("answer-*.json")):
            if skipped := records.read_json(path).get("skipped_frac_by_layer"):
                return [1 - share for share in skipped.values()]
        return None


def made_row(level: str, models: Models, model: str, n_batch: int, context: int, args: argparse.Namespace) -> Any:
    """Times one row."""
    device = torch.device(args.device)
    if level == "kernel":
        return serving_ways.kernel(model, n_batch, context, args.read_frac, args.repeats, device)
    made = models(model)
    if level == "answer":
        return serving_ways.answer(made, n_batch, context, args.tokens, min(3, args.repeats), device)
    compiled = level == "compiled"
    more = {"shares": made.shares, "weights": "random" if made.tokens is None else "pretrained"}
    found = serving_ways.step(made, n_batch, context, args.repeats, device, compiled=compiled, eager=not compiled)
    return found | more


def parsed(name: str) -> tuple[str, str, int, int]:
    """Level, model, context and batch of a row's name.

    Raises:
        SystemExit: when the name is not one.
    """
    level, _, rest = name.partition("-")
    model, _, sizes = rest.rpartition("-b")
    model, _, context = model.rpartition("-")
    if level not in ("kernel", "step", "compiled", "answer") or not (context.isdigit() and sizes.isdigit() and model):
        raise SystemExit(f"row {name!r} is not known; give one such as step-1b-32768-b8, or a pattern of {ROWS[0]} ...")
    return level, model, int(context), int(sizes)


def _asked(patterns: list[str]) -> list[str]:
    """Names of rows that patterns ask for, in the order of `ROWS`; other names as they are."""
    named = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    others = [p for p in patterns if p not in ROWS and not set(p) & set("*?[")]
    for name in others:
        parsed(name)
    return named + others


def shown(found: dict[str, Any]) -> str:
    """The medians of a row."""
    if "left_out" in found:
        return found["left_out"]
    return "; ".join(f"{name} {way['ms']['median']:.3f} ms" for name, way in found["ways"].items())


if __name__ == "__main__":
    sys.exit(main())
