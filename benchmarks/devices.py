"""Times a training step of language models on one device and on several, which share every batch by `cramlab.ranks`.

    python -m benchmarks.devices --out devices.json
    python -m benchmarks.devices --device cuda --arms llama cram-12 --context 4096 --batch 8 --out devices-cuda.json \
        --set d_model=1024 n_layers=24 n_heads=16

Nothing is reported unless all numbers of devices train a tiny model to the same weights on the CPU, to rounding.

A device has as many sequences a step in every row, so twice the devices train on twice the tokens. Models are past
their encoding phase. On a CPU each process has one thread, models are not compiled, and the time that the processes
spend computing is given beside the time that passes, because other work on the machine changes only the latter.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cramlab import records
from cramlab.config import overridden, to_dict
from cramlab.files import write_json
from cramlab.language_model.reading_schedule import ReadingSchedule
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText
from cramlab.language_model.training import start, train_step
from cramlab.launch import launch
from cramlab.ranks import Ranks
from cramlab.timing import spread
from reproduction.protocols.language import ARMS, BASE

_WARMUPS = 3
_PARITY_STEPS = 20
_MOST_DIFFERENCE = 1e-8  # of a weight in 64 bits, after these steps
_TINY: dict[str, Any] = {
    "vocab_size": 64, "context": 32, "d_model": 32, "n_heads": 2, "batch_size": 8, "n_steps": 2 * _PARITY_STEPS,
    "device": "cpu", "precision": "32", "compile": False, "encoding_frac": 0.1, "warmup_steps": 2,
}  # fmt: skip


def main(given: list[str] | None = None) -> int:
    """Prints a table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of devices")
    parser.add_argument("--arms", nargs="+", default=["llama", "cram-12"], choices=ARMS, metavar="ARM")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step on each device (default: 4)")
    parser.add_argument("--repeats", type=int, default=21, metavar="N", help="timed steps (default: 21)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of TextRunConfig")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args(given)
    small = {} if args.device == "cuda" else {"d_model": 128, "vocab_size": 2048, "precision": "32", "compile": False}
    base = dataclasses.replace(
        BASE, device=args.device, context=args.context, loss_over="targets", ramp_frac=0.0, **small
    )
    configs = {
        (arm, n): dataclasses.replace(
            overridden(dataclasses.replace(base, arm=arm, **ARMS[arm]), args.set), batch_size=args.batch * n, devices=n
        )
        for n in args.devices for arm in args.arms
    }  # fmt: skip
    weights: dict[tuple[str, int], Any] = {}
    steps: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in configs}

    def heard(message: tuple[str, tuple[str, int], Any]) -> None:
        what, key, value = message
        if what == "weights":
            weights[key] = value
        else:
            steps[key].append(value)

    for n in args.devices:
        own = [configs[arm, n] for arm in args.arms]
        launch(_rank, {"configs": own, "repeats": args.repeats}, n_ranks=n, name=f"{n} devices", on_message=heard)
    first = args.devices[0]
    difference = {arm: max(float(abs(weights[arm, n] - weights[arm, first]).max()) for n in args.devices)
                  for arm in args.arms}  # fmt: skip
    if any(not value <= _MOST_DIFFERENCE for value in difference.values()):
        print(f"numbers of devices train other weights: largest differences {difference}", file=sys.stderr)
        return 1
    rows = [_row(config, steps[key]) for key, config in configs.items()]
    result = records.header(torch.device(args.device)) | {
        "kind": "devices", "context": args.context, "batch_a_device": args.batch, "rows": rows,
        "parity": {"steps": _PARITY_STEPS, "largest_difference": difference},
        "configs": {arm: to_dict(configs[arm, args.devices[0]]) for arm in args.arms},
    }  # fmt: skip
    if args.out is not None:
        write_json(args.out, result)
    shown = Table(
        "arm", "devices", "parameters", "ms a step", "computing, ms a step", "tokens a second", "GiB a device"
    )
    for row in rows:
        cells = (f"{row[name]['median']:,.1f} [{row[name]['p10']:,.1f}, {row[name]['p90']:,.1f}]"
                 for name in ("ms", "computing_ms"))  # fmt: skip
        sizes = f"{row['tokens_per_s']:,.0f}", "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        shown.add_row(row["arm"], str(row["devices"]), f"{row['n_parameters']:,}", *cells, *sizes)
    Console(width=140).print(shown)
    return 0


def _rank(ranks: Ranks, send: Callable[[Any], None], configs: list[TextRunConfig], repeats: int) -> None:
    """The body of a rank's process: for every arm, the weights of a tiny model for comparison, then timed steps."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    for config in configs:
        key = config.arm, ranks.n
        weights = _weights(ranks, dataclasses.replace(config, **_TINY))
        if ranks.first:
            send(("weights", key, weights))
        for step in _steps(ranks, config, repeats):
            if ranks.first:
                send(("step", key, step))


def _weights(ranks: Ranks, config: TextRunConfig) -> np.ndarray[Any, Any]:
    """Weights after some steps of a tiny model, on the CPU in 64 bits, in one row."""
    torch.set_default_dtype(torch.float64)
    tokens = torch.randint(config.vocab_size, (2000,), generator=torch.Generator().manual_seed(0))
    text, reading = PreparedText(None, tokens, tokens), ReadingSchedule()
    model, optimizer = start(config)
    for step in range(_PARITY_STEPS):
        train_step(model, optimizer, text, config, step, reading, ranks)
    torch.set_default_dtype(torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def _steps(ranks: Ranks, config: TextRunConfig, repeats: int) -> Iterator[dict[str, Any]]:
    """Trains some steps and yields the times of each."""
    on_cuda = config.device == "cuda"
    tokens = torch.randint(config.vocab_size, (200 * config.context,), generator=torch.Generator().manual_seed(0))
    text, reading = PreparedText(None, tokens, tokens), ReadingSchedule(ended_at=0)
    model, optimizer = start(config)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(1, 1 + _WARMUPS + repeats):
        ranks.sum(torch.zeros(1))  # all begin together
        from_s, computed_s = time.perf_counter(), time.process_time()
        train_step(model, optimizer, text, config, step, reading, ranks)
        if on_cuda:
            torch.cuda.synchronize()
        ms, own = 1000 * (time.perf_counter() - from_s), 1000 * (time.process_time() - computed_s)
        computing = float(ranks.sum(torch.tensor([own], dtype=torch.float64)))
        if step > _WARMUPS:
            yield {
                "ms": ms, "computing_ms": computing, "n_parameters": sum(p.numel() for p in model.parameters()),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
            }  # fmt: skip


def _row(config: TextRunConfig, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """One line: the spread of the times. A multiplication and an addition are two FLOPs."""
    ms, computing = (spread([step[name] for step in steps]) for name in ("ms", "computing_ms"))
    rate = 1000 * config.batch_size * config.context / ms["median"]
    n_parameters = steps[0]["n_parameters"]
    return {
        "arm": config.arm, "devices": config.devices, "n_parameters": n_parameters, "n_steps": len(steps), "ms": ms,
        "computing_ms": computing, "tokens_per_s": rate, "peak_gib": steps[-1]["peak_gib"],
        "tflops_of_parameters": 6 * n_parameters * rate / 1e12,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
