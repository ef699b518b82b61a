"""Routed execution on an accelerator: parity, speed against FlashAttention, roofline, torch.compile.

    python benchmarks/accelerator.py --minutes 9                     # as much as fits; call again to go on
    python benchmarks/accelerator.py --device cpu --longest 256      # a dry run

Each measurement is a file of its own in --out, so that a run that was cut off, or out of time, goes on where it was.
A number type whose parity fails is not timed. The paper-size models are trained by
`cramlab run srcd_deep --size paper --set training.accelerator=cuda --resume`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rows
import torch
from timing import core_ms, cuda_ms, side_by_side
from torch import Tensor

from cramlab import records
from cramlab.files import write_json
from cramlab.model import Block

ROOT = Path(__file__).parent.parent
LENGTHS = [2048, 4096, 8192, 16384, 32768, 65536]
SHARES = (0.01, 0.016, 0.05, 0.1, 0.25, 0.5, 1.0)
# Largest difference, as a share of the largest output: sums of thousands of terms in another order.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 3e-2}
Unit = tuple[str, Callable[[], dict[str, Any]]]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, as a share of the largest expected."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def parity(where: rows.Where, n_tokens: int) -> dict[str, Any]:
    """Routed against dense scores, gradients too; and one-token steps against one pass."""
    torch.manual_seed(0)
    x = where.rand(2, n_tokens, rows.D)
    block = rows.cram_block(x, read_frac=0.1, write="all")
    found: dict[str, float] = {}
    h = where.rand(1, n_tokens, rows.D)
    memory = rows.episodic("all", where)
    written = memory.write(h, torch.ones_like(h[..., 0]), memory.initial_buffer(1), None)
    reads = rows.some(n_tokens, 0.1, where)
    outputs, gradients = [], []
    for dense in (True, False):
        given = h.clone().requires_grad_()
        y = memory.read(given, None, written) if dense else memory.read(given, reads, written)
        y = y * reads[..., None]
        gradients.append(
            torch.autograd.grad(y.float().square().sum(), [given, memory.w_query.weight], retain_graph=True)
        )
        outputs.append(y.detach())
    found["routed against dense"] = difference(outputs[1], outputs[0])
    found["their gradients"] = max(difference(b, a) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        whole, mixed = rows.forward(block, x)
        reads, state, outputs, decided = mixed.trace.attended, None, [], []
        for t in range(n_tokens):
            mixed = block.mix(x[:, t : t + 1], torch.ones_like(x[:, :1, 0]), state, None, None)
            outputs.append(block.finish(x[:, t : t + 1], mixed.y))
            decided.append(mixed.trace.attended)
            state = mixed.state
        same = torch.cat(decided, dim=1) == reads  # a gate at its threshold may go either way by rounding
        found["steps against one pass"] = difference(torch.cat(outputs, dim=1)[same], whole[same])
        found["tokens decided otherwise"] = 1 - float(same.float().mean())
    limit = TOLERANCES[where.dtype]
    return {"differences": found, "tolerance": limit, "holds": all(v <= limit for v in found.values())}


def ceilings(where: rows.Where) -> dict[str, Any]:
    """What the device reaches at best: bytes a second copied, and FLOPs a second of a large product."""
    size = 8192 if not where.on_cpu else 512
    a, b = where.rand(size, size), where.rand(size, size)
    clock = core_ms if where.on_cpu else cuda_ms
    found = side_by_side({"copy": lambda: a.clone(), "product": lambda: a @ b}, repeats=21, warmups=5, clock=clock)
    ms = {name: way["ms"]["median"] for name, way in found.items()}
    return {
        "copy_bytes_per_s": 2 * a.numel() * a.element_size() / (ms["copy"] / 1e3),
        "product_flops_per_s": 2 * size**3 / (ms["product"] / 1e3),
    }


def roofline(row: dict[str, Any]) -> dict[str, Any]:
    """Least work of the scores alone, by way: half of all pairs, or of those of the readers."""
    n, share = row["n_tokens"], row["read_frac"]
    held = 2 * n * rows.D * 2
    return row | {
        "least_flops": {"dense": 4 * rows.D * n * n / 2, "routed": 4 * rows.D * share * n * n / 2},
        "least_bytes_bf16": {"dense": 2 * held, "routed": held + 2 * 2 * share * n * rows.D},
    }


def compiled(where: rows.Where, n_tokens: int) -> dict[str, Any]:
    """A block forward, with and without `torch.compile`."""
    x = where.rand(1, n_tokens, rows.D)
    blocks: dict[str, Block] = {"transformer": rows.transformer_block(where), "cram": rows.cram_block(x)}
    faster = {name: torch.compile(rows.forward) for name in blocks}
    ways: dict[str, Callable[[], Any]] = {}
    for name, block in blocks.items():
        ways[name] = lambda block=block: rows.forward(block, x)
        ways[f"{name}, compiled"] = lambda block=block, go=faster[name]: go(block, x)
    with torch.no_grad():
        return rows.row("torch.compile, whole layer, forward", n_tokens, ways, where, read_frac=rows.READ_FRAC)


def units(device: torch.device, lengths: list[int], out: Path) -> Iterator[Unit]:
    """All measurements, in order; those of a number type only if its parity holds."""
    for dtype in (torch.float32, torch.bfloat16):
        where, name = rows.Where(device, dtype), str(dtype).removeprefix("torch.")
        yield f"parity-{name}", lambda where=where: parity(where, min(512, lengths[-1]))
    where = rows.Where(device, torch.bfloat16)
    if not json.loads((out / "parity-bfloat16.json").read_text(encoding="utf-8"))["holds"]:
        raise SystemExit(f"parity in bfloat16 does not hold, so nothing is timed; see {out / 'parity-bfloat16.json'}")
    yield "ceilings", lambda: ceilings(where)
    for n in lengths:
        for share in SHARES:
            yield f"scores-{n}-{share:g}", lambda n=n, share=share: roofline(next(rows.scores([n], (share,), where)))
        yield f"tier-{n}", lambda n=n: next(rows.tier([n], where))
        yield f"forward-{n}", lambda n=n: next(rows.layer_forward([n], where))
        yield f"training-{n}", lambda n=n: next(rows.training_step([n], where))
    for n in sorted({min(1024, lengths[0]), *lengths}):
        yield f"decode-{n}", lambda n=n: next(rows.decode([n], where=where))
    for n in lengths[:3]:
        yield f"compiled-{n}", lambda n=n: compiled(where, n)


def main() -> int:
    """Returns 3 when time ran out before everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "accelerator", metavar="DIR")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after so long (default: 9)")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], metavar="N", help="greatest length, tokens")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none; --device cpu makes a dry run")
    end = time.monotonic() + 60 * args.minutes
    lengths = [n for n in LENGTHS if n <= args.longest] or [args.longest]
    torch.manual_seed(0)
    for name, measure in units(device, lengths, args.out):
        path = args.out / f"{name}.json"
        if path.exists():
            continue
        if time.monotonic() > end:
            print(f"out of time before {name}; call again to go on", file=sys.stderr)
            return 3
        try:
            found = measure()
        except torch.cuda.OutOfMemoryError as error:
            found = {"failed": f"out of memory: {error}"}
        write_json(path, records.header(device) | {"name": name} | found)
        print(name, json.dumps(found.get("ways", found))[:300], file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
