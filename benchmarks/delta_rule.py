"""Times the gated delta rule beside its reference and beside attention of the same width, on the present device.

    python -m benchmarks.delta_rule                                     # CUDA if there is one, else one core
    python -m benchmarks.delta_rule --sizes 16x1024x8 1x16384x8 --compile --out delta.json
    python -m benchmarks.delta_rule --device cpu --sizes 1x256x2 --repeats 3

A size is sequences x tokens x heads. "reference" is batched products and a loop over chunks, "kernels" are three;
values and attention have 16 bits on CUDA, as under autocast. Nothing is timed unless both equal the token loop in 64
bits, outputs and gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accelerator import difference
from benchmarks.timing import core_ms, cuda_ms, side_by_side
from cramlab import records
from cramlab.files import write_json
from cramlab.ops import dispatch
from cramlab.ops.scan import delta_fused
from cramlab.ops.scan.delta import delta_rule, delta_rule_by_tokens

TOLERANCE = 1e-4  # size of the difference, as a share of the size of the outputs or gradients
Rule = Callable[..., tuple[Tensor, Tensor]]


def main(given: list[str] | None = None) -> int:
    """Returns 1, having timed nothing, when parity does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=size, default=[(16, 1024, 8)], metavar="BxTxH")
    parser.add_argument("--d-head", type=int, default=64, metavar="N", help="channels of a head (default: 64)")
    parser.add_argument("--repeats", type=int, default=21, metavar="N", help="timed calls of each way (default: 21)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also time what torch.compile makes of the kernels' way")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args(given)
    device = torch.device(args.device)
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rules = ways(device, args.d_head, compiled=args.compile)
    found = {name: parity(rule, device, args.d_head) for name, rule in rules.items()}
    if not all(share <= TOLERANCE for share in found.values()):  # a NaN fails too
        print(f"parity is broken, so nothing is timed: {found}, tolerance {TOLERANCE}", file=sys.stderr)
        return 1
    clock = core_ms if device.type == "cpu" else cuda_ms
    rows = []
    for n_batch, n_tokens, n_heads in args.sizes:
        for backward in (False, True):
            works = timed(rules, example(device, n_batch, n_tokens, n_heads, args.d_head), backward)
            row = {"n_batch": n_batch, "n_tokens": n_tokens, "n_heads": n_heads, "backward": backward}
            rows.append(row | {"ways": side_by_side(works, repeats=args.repeats, warmups=3, clock=clock)})
            print(f"{n_batch}x{n_tokens}x{n_heads}, {what(row)}", file=sys.stderr)
    result = records.header(device) | {
        "kind": "timings", "d_head": args.d_head, "parity": found, "tolerance": TOLERANCE, "rows": rows,
    }  # fmt: skip
    if args.out is not None:
        write_json(args.out, result)
    Console(width=120).print(table(rows))
    return 0


def size(text: str) -> tuple[int, int, int]:
    """Sequences, tokens and heads."""
    n_batch, n_tokens, n_heads = (int(part) for part in text.split("x"))
    return n_batch, n_tokens, n_heads


def example(device: torch.device, n_batch: int, n_tokens: int, n_heads: int, d_head: int) -> list[Tensor]:
    """Arguments of the rule as a layer gives them, with gradients."""
    shape = (n_batch, n_tokens, n_heads)
    q, k = (F.normalize(torch.randn(*shape, d_head, device=device), dim=-1) for _ in range(2))
    v = torch.randn(*shape, d_head, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
    beta, log_decay = torch.rand(shape, device=device), -0.1 * torch.rand(shape, device=device)
    state = torch.randn(n_batch, n_heads, d_head, d_head, device=device)
    return [t.requires_grad_() for t in (q, k, v, beta, log_decay, state)]


def ways(device: torch.device, d_head: int, *, compiled: bool) -> dict[str, Rule]:
    """Ways to compute the rule, the reference first."""
    found: dict[str, Rule] = {"reference": switched(False)}
    if delta_fused.usable(*example(device, 1, 1, 1, d_head)[:5], chunk=1):
        found["kernels"] = switched(True)
    if compiled:
        found["compiled"] = torch.compile(delta_rule)
    return found


def switched(on: bool) -> Rule:
    """The rule with or without kernels."""

    def rule(*given: Tensor) -> tuple[Tensor, Tensor]:
        with dispatch.switched(on):
            return delta_rule(*given)

    return rule


def parity(rule: Rule, device: torch.device, d_head: int) -> float:
    """The largest difference of outputs and gradients from the token loop in 64 bits."""
    given = [t.detach().float().requires_grad_() for t in example(device, 2, 200, 3, d_head)]
    exact = [t.detach().double().requires_grad_() for t in given]
    numbers = []
    for way, leaves in ((rule, given), (delta_rule_by_tokens, exact)):
        answers, state = way(*leaves)
        numbers.append([answers, state, *torch.autograd.grad(answers.sin().sum() + state.cos().sum(), leaves)])
    return max(difference(fast, slow) for fast, slow in zip(*numbers, strict=True))


def timed(rules: dict[str, Rule], given: list[Tensor], backward: bool) -> dict[str, Callable[[], Any]]:
    """The calls to time: each way, and attention."""
    v = given[2]
    heads = [t.detach().to(v.dtype).transpose(1, 2).contiguous().requires_grad_() for t in given[:3]]
    weight, across = torch.randn_like(v), torch.randn_like(heads[2])

    def work(answer: Callable[[], Tensor], weight: Tensor, leaves: list[Tensor]) -> Callable[[], Any]:
        if backward:
            return lambda: torch.autograd.grad(answer(), leaves, weight)
        return torch.no_grad()(answer)

    works = {name: work(lambda rule=rule: rule(*given)[0], weight, given) for name, rule in rules.items()}
    return works | {"attention": work(lambda: F.scaled_dot_product_attention(*heads, is_causal=True), across, heads)}


def what(row: dict[str, Any]) -> str:
    """The passes that a row times."""
    return "forward and backward" if row["backward"] else "forward"


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a way."""
    shown = Table("sequences", "tokens", "heads", "passes", "way", "ms, median [p10, p90]", "speedup [p10, p90]")
    for row in rows:
        for i, (name, way) in enumerate(row["ways"].items()):
            sizes = (str(row["n_batch"]), f"{row['n_tokens']:,}", str(row["n_heads"]), what(row))
            spreads = ("{median:,.3f} [{p10:,.3f}, {p90:,.3f}]".format(**way[part]) for part in ("ms", "speedup"))
            shown.add_row(*(sizes if not i else ("",) * 4), name, *spreads)
        shown.add_section()
    return shown


if __name__ == "__main__":
    sys.exit(main())
