"""Times a training step of CRAM language models beside a Llama of equal size, as docs/language.md trains them.

    python -m benchmarks.language_step --out language-step.json
    python -m benchmarks.language_step --arms llama layer-7 --context 2048 --batch 16

All models are compiled and take the same random tokens. Models with gates are past their encoding phase and read their
share of the tokens. The first arm is the baseline of the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.timing import core_ms, cuda_ms, side_by_side
from cramlab import records
from cramlab.config import overridden, to_dict
from cramlab.files import write_json
from cramlab.language_model.reading_schedule import ReadingSchedule
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText
from cramlab.language_model.training import start, train_step
from reproduction.protocols.language import ARMS, BASE


def main(given: list[str] | None = None) -> int:
    """Prints a table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", default=["llama", "layer-7", "cram-12", "cram-3"], choices=ARMS, metavar="ARM"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step (default: 16)")
    parser.add_argument("--repeats", type=int, default=21, metavar="N", help="timed steps of each arm (default: 21)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="field of TextRunConfig")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args(given)
    base = dataclasses.replace(BASE, device=args.device, context=args.context, batch_size=args.batch, ramp_frac=0.0)
    base = overridden(base, args.set)
    torch.set_float32_matmul_precision("high")
    tokens = torch.randint(base.vocab_size, (200 * base.context,), generator=torch.Generator().manual_seed(0))
    text = PreparedText(None, tokens, tokens)
    configs = {arm: dataclasses.replace(base, arm=arm, **ARMS[arm]) for arm in args.arms}
    works, sizes = {}, {}
    for arm, config in configs.items():
        model, works[arm] = training(config, text)
        sizes[arm] = sum(p.numel() for p in model.parameters())
    clock = core_ms if torch.device(args.device).type == "cpu" else cuda_ms
    ways = side_by_side(works, repeats=args.repeats, warmups=10, clock=clock)
    result = records.header(torch.device(args.device)) | {
        "kind": "timings", "context": base.context, "batch_size": base.batch_size, "n_parameters": sizes, "ways": ways,
        "configs": {arm: to_dict(config) for arm, config in configs.items()},
    }  # fmt: skip
    if args.out is not None:
        write_json(args.out, result)
    shown = Table("arm", "parameters", "ms a step [p10, p90]", "tokens a second", "speed, of the first [p10, p90]")
    for arm, way in ways.items():
        spreads = ["{median:,.3f} [{p10:,.3f}, {p90:,.3f}]".format(**way[part]) for part in ("ms", "speedup")]
        rate = 1000 * base.context * base.batch_size / way["ms"]["median"]
        shown.add_row(arm, f"{sizes[arm]:,}", spreads[0], f"{rate:,.0f}", spreads[1])
    Console(width=120).print(shown)
    return 0


def training(config: TextRunConfig, text: PreparedText) -> tuple[nn.Module, Callable[[], Any]]:
    """A model, and a call that trains it by one step, gates closed."""
    model, optimizer = start(config)
    reading, step = ReadingSchedule(ended_at=0), iter(range(10**9))
    return model, lambda: train_step(model, optimizer, text, config, next(step), reading)


if __name__ == "__main__":
    sys.exit(main())
