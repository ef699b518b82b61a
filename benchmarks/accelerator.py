"""Routed execution on an accelerator: parity, speed against FlashAttention, roofline, launches, torch.compile.

    python -m benchmarks.accelerator --minutes 8                     # as much as fits; call again to continue
    python -m benchmarks.accelerator --only ceilings                 # the checks and a first look, a minute
    python -m benchmarks.accelerator --device cpu --longest 256      # a dry run

Checks come first, then what the goals need. Each measurement is a file of its own in --out, so an interrupted run
continues; a measurement that fails leaves a file that says so, and is repeated when that file is deleted. Where a check
fails, what it covers is not timed; where the kernel's own check fails, the fused kernel is not used. The paper-size
models are trained by
`cramlab run srcd_deep --size paper --set training.accelerator=cuda --resume`.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import rows
from benchmarks.timing import core_ms, cuda_ms, side_by_side
from cramlab import records
from cramlab.files import write_json
from cramlab.memory import CRAMConfig, CRAMState, EpisodicMemoryConfig
from cramlab.memory.decode import Decoder, GraphDecoder
from cramlab.memory.readers import select_readers
from cramlab.ops import dispatch
from cramlab.ops.read import fused, naive
from reproduction.pages import accelerator as accelerator_page

ROOT = Path(__file__).parent.parent
LENGTHS = [2048, 4096, 8192, 16384, 32768, 65536]
FIRST = [16384, 65536]  # the lengths of the goals
BATCHES = (1, 8)
MOST_TOKENS = 2**19  # at eight sequences of the greatest length
SHARES = (0.01, 0.016, 0.05, 0.1, 0.25, 0.5, 1.0)
UNIT_S, GRACE_S = 90, 30  # a measurement that takes longer is given up; one that cannot be is ended with the process
UNITS_S = {"compiled": 150, "compiled_training": 150}  # those that take long
# Size of the difference, as a share of the size of the outputs: sums of thousands of terms in another order.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# The check that a kind of measurement needs, in its own number type; what is not named here needs none.
NEEDS = {
    "tier": "routed",
    "training": "routed",
    "forward": "routed",
    "scores": "routed",
    "compiled": "routed",
    "compiled_training": "routed",
    "decode": "steps",
}
Unit = tuple[str, Callable[[], dict[str, Any]]]


def difference(found: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over that of `expected`; a single entry may be an outlier of rounding."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def kernel_parity(where: rows.Where) -> dict[str, Any]:
    """The fused kernel against masked attention in 64 bits, outputs and gradients."""
    torch.manual_seed(0)
    found: dict[str, float] = {}
    cases: list[tuple[str, list[int], int, bool, int | None]] = [
        ("prefixes, sequences with many, few and no readers", [40, 3, 0], 700, False, None),
        ("holes and a bound", [40, 3, 0], 700, True, 200),
    ]
    if where.dtype == torch.bfloat16:
        cases += [("one reader", [1], 4096, False, 300), ("thousands of readers", [2600], 2600, False, None)]
    if not fused.usable(where.rand(1, 1, rows.D), rows.N_HEADS):
        return {"holds": False, "failed": "no CUDA or no Triton, or a number type that the kernel does not know"}
    for name, n_readers, n_places, holes, capacity in cases:
        n_batch = len(n_readers)
        q, k, v = (where.rand(n_batch, n, rows.D).requires_grad_() for n in (max(n_readers), n_places, n_places))
        last = torch.randint(n_places, q.shape[:2], device=where.device).sort(dim=1).values
        for row, n in zip(last, n_readers, strict=True):
            row[n:] = -1
        filled = torch.rand(k.shape[:2], device=where.device) < (0.6 if holes else 2.0)
        fast = fused.attend(q, last, k, v, filled if holes else None, rows.N_HEADS, capacity)
        slow = naive.attend(q.double(), last, k.double(), v.double(), filled, rows.N_HEADS, capacity)
        found[name] = difference(fast, slow)
        weight = torch.randn_like(q)
        grads = [torch.autograd.grad((y * weight.to(y.dtype)).sum(), [q, k, v]) for y in (fast, slow)]
        found[f"{name}: gradients"] = max(difference(a, b) for a, b in zip(*grads, strict=True))
    return verdict(found, where)


def routed_parity(where: rows.Where, n_tokens: int) -> dict[str, Any]:
    """Compares routed with dense scores, outputs and gradients."""
    torch.manual_seed(0)
    h = where.rand(1, n_tokens, rows.D)
    memory = rows.episodic("all", where)
    written = memory.write(h, torch.ones_like(h[..., 0]), memory.initial_buffer(1), None)
    reads = rows.some(n_tokens, 0.1, where)
    outputs, gradients = [], []
    for asking in (torch.ones_like(reads), reads):  # all tokens; those that do not read are dropped
        given = h.clone().requires_grad_()
        readers = select_readers(asking)
        y = readers.put_onto(memory.read(given, readers, written), torch.zeros_like(given)) * reads[..., None]
        gradients.append(
            torch.autograd.grad(y.float().square().sum(), [given, memory.w_query.weight], retain_graph=True)
        )
        outputs.append(y.detach())
    gradient = max(difference(b, a) for a, b in zip(*gradients, strict=True))
    return verdict({"routed against dense": difference(outputs[1], outputs[0]), "their gradients": gradient}, where)


@torch.no_grad()
def steps_parity(where: rows.Where, n_tokens: int) -> dict[str, Any]:
    """Compares each way of single steps with one pass, for a block whose gate lets a tenth of the tokens read.

    Tokens whose gate is nearer to its threshold than the tolerance (in deviations of the logits) are counted and left
    out, because rounding may decide them otherwise.
    """
    torch.manual_seed(0)
    x = where.rand(2, n_tokens, rows.D)
    block = rows.cram_block(x, read_frac=0.1, write="all", capacity=n_tokens)
    layer, gaps = block.mixer, torch.ones(x.shape[:2], device=x.device)
    whole, mixed = rows.forward(block, x)
    logit, limit = mixed.trace.gate_logit.float(), TOLERANCES[where.dtype]
    clear = logit.abs() > limit * logit.std()
    start = CRAMState(working=layer.working.initial_state(len(x)), buffer=layer.episodic.initial_buffer(len(x)))
    decoder, graph_decoder, state = Decoder(layer, start), GraphDecoder(layer, start), start

    def call(x: Tensor, gaps: Tensor) -> Tensor:
        nonlocal state
        mixed = layer(x[:, None], gaps[:, None], state)
        state = mixed.state
        return mixed.y[:, 0]

    found = {}
    for name, step in (("calls", call), ("Decoder", decoder.step), ("GraphDecoder", graph_decoder.step)):
        steps = [
            block.finish(now, step(block.mixer_input(now), gap))
            for now, gap in zip(x.unbind(1), gaps.unbind(1), strict=True)
        ]
        found[f"{name}, token by token, against one pass"] = difference(torch.stack(steps, dim=1)[clear], whole[clear])
    return verdict(found, where) | {"left_out": 1 - float(clear.float().mean())}


def verdict(differences: dict[str, float], where: rows.Where) -> dict[str, Any]:
    """Whether all differences are within the tolerance of the number type; a NaN is not."""
    limit = TOLERANCES[where.dtype]
    return {"differences": differences, "tolerance": limit, "holds": all(v <= limit for v in differences.values())}


def ceilings(where: rows.Where) -> dict[str, Any]:
    """Measures the peak of the device: bytes per second of a copy, and FLOPs per second of a large matrix product."""
    size = 8192 if not where.on_cpu else 512
    a, b = where.rand(size, size), where.rand(size, size)
    clock = core_ms if where.on_cpu else cuda_ms
    found = side_by_side({"copy": lambda: a.clone(), "product": lambda: a @ b}, repeats=21, warmups=5, clock=clock)
    ms = {name: way["ms"]["median"] for name, way in found.items()}
    return {
        "copy_bytes_per_s": 2 * a.numel() * a.element_size() / (ms["copy"] / 1e3),
        "product_flops_per_s": 2 * size**3 / (ms["product"] / 1e3),
    }


@torch.no_grad()
def attention_backends(where: rows.Where, n_tokens: int) -> dict[str, Any]:
    """Times causal attention by each of PyTorch's kernels: the one that the dense way uses, and the others."""
    q, k, v = (where.rand(1, rows.N_HEADS, n_tokens, rows.D // rows.N_HEADS) for _ in range(3))

    def by(backend: SDPBackend | None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with sdpa_kernel([backend]), warnings.catch_warnings(action="ignore"):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    ways: dict[str, Callable[[], Any]] = {"as chosen": lambda: by(None)}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        backend = getattr(SDPBackend, name)
        try:
            by(backend)
        except RuntimeError:  # this device has none
            continue
        ways[name] = lambda backend=backend: by(backend)
    return rows.row("causal attention by kernel", n_tokens, ways, where, chosen=rows.dense_kernel(where))


def with_least_work(row: dict[str, Any]) -> dict[str, Any]:
    """Adds the minimal FLOPs and bytes (16-bit numbers) of each way: operands move once, half the pairs count."""
    n, d, n_batch = row["n_tokens"], rows.D, row.get("n_batch", 1)
    read, held = row["read_frac"] * n, row.get("write_frac", 1.0) * n
    projections = row["what"] != "scores only, full buffer"
    flops = {"dense": 2.0 * d * n * n, "routed": 2.0 * d * read * held}
    numbers = {"dense": 4.0 * n * d, "routed": 2 * held * d + 2 * read * d}
    if projections:
        flops = {"dense": flops["dense"] + 8.0 * d * d * n, "routed": flops["routed"] + 4.0 * d * d * (read + held)}
        numbers = {"dense": 2.0 * n * d, "routed": (read + held) * d + n * d}
    if row["what"] in ("whole layer, forward", "layer, training step"):
        layer = CRAMConfig(episodic=EpisodicMemoryConfig(n_heads=rows.N_HEADS, write="salience")).build(d)
        ours = layer.cost(n, read_frac=row["read_frac"], write_frac=row["write_frac"]).flops
        times = 3 if row["what"] == "layer, training step" else 1
        mlp = 2.0 * 2 * 4 * d * d * n
        flops = {"transformer": times * (flops["dense"] + mlp), "cram": times * (ours + mlp)}
        numbers = dict.fromkeys(flops, times * 2.0 * n * d)
    least = {name: {"flops": n_batch * flops[name], "bytes": 2 * n_batch * numbers[name]} for name in flops}
    return row | {"least": least}


def launches(where: rows.Where, n_tokens: int, n_batch: int) -> dict[str, Any]:
    """Counts kernels launched and waits for the device, with their time, in one call of the tier and of training."""
    found: dict[str, Any] = {}

    def counting(what: str, ways: dict[str, Callable[[], Any]], **_: Any) -> dict[str, Any]:
        for name, way in ways.items():
            way()
            with torch.profiler.profile() as profile:
                way()
                torch.cuda.synchronize()
            n_launches = sum(
                any(part in event.name for part in ("LaunchKernel", "GraphLaunch", "cudaMemsetAsync"))
                for event in profile.events()
            )
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                way()
            torch.cuda.set_sync_debug_mode("default")
            attention = {event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product")}
            on_device = torch.autograd.DeviceType.CUDA  # not the operators, which have the same time once more
            kernels = [event for event in profile.key_averages() if event.device_type == on_device]
            kernels.sort(key=lambda event: -event.self_device_time_total)
            found[f"{what}, {name}"] = {
                "launches": n_launches, "waits": len(waits), "attention": sorted(attention),
                "device_us": sum(event.self_device_time_total for event in kernels),
                "kernels": [
                    {"name": event.key[:100], "calls": event.count, "us": event.self_device_time_total}
                    for event in kernels[:12]
                ],
            }  # fmt: skip
        return {}

    real = rows.side_by_side
    try:
        for what, made in (("tier", rows.tier), ("training", rows.training_step)):
            rows.side_by_side = functools.partial(counting, what)
            next(made([n_tokens], where, n_batch))
    finally:
        rows.side_by_side = real
        torch.cuda.set_sync_debug_mode("default")
    return {"n_tokens": n_tokens, "n_batch": n_batch, "calls": found}


def compiled(where: rows.Where, n_tokens: int, n_batch: int, *, training: bool = False) -> dict[str, Any]:
    """Times a block with and without `torch.compile`, and as graphs; a failed compilation does not stop the others."""
    torch.compiler.reset()  # else another shape would be compiled for all shapes
    x = where.rand(n_batch, n_tokens, rows.D)
    ours, theirs = rows.cram_block(x), rows.transformer_block(where)
    for block in (ours, theirs):
        block.train(training)
    bounded = rows.bounded(ours, x)
    x.requires_grad_(training)
    works = {"transformer": (theirs, x, None), "cram": (ours, x, None), "cram, bounded": (ours, x, bounded)}
    if training:  # several graphs gain nothing
        del works["cram"]

    def way_by(go: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], Any]:
        return functools.partial(rows.train, *given, go) if training else torch.no_grad()(functools.partial(go, *given))

    plain = rows.loss if training else rows.answer
    ways: dict[str, Callable[[], Any]] = {name: way_by(plain, given) for name, given in works.items()}
    failed: dict[str, str] = {}
    for name, given in works.items():
        way = way_by(torch.compile(plain, fullgraph="bounded" in name), given)
        try:
            way()
        except Exception as error:  # of whatever a compiler throws, also out of time
            said = " ".join(str(error).replace(f"{ROOT}/", "").split())
            failed[f"{name}, compiled"] = f"{type(error).__name__}: {said[-500:]}"
        else:
            ways[f"{name}, compiled"] = way
    recorded = {name: way for name, way in ways.items() if name.startswith(("transformer", "cram, bounded"))}
    failed |= rows.with_graphs(ways, recorded, where).get("failed_ways", {})
    what = "layer, training step" if training else "whole layer, forward"
    found = rows.row(f"torch.compile, {what}", n_tokens, ways, where, n_batch=n_batch)
    return found | {"read_frac": rows.READ_FRAC} | ({"failed_ways": failed} if failed else {})


def checks(device: torch.device, longest: int) -> Iterator[Unit]:
    """The checks that must hold before anything is timed."""
    kinds = {"kernel": kernel_parity, "routed": routed_parity, "steps": steps_parity}
    for kind, check in kinds.items():
        for dtype in (torch.bfloat16, torch.float32):
            given = (rows.Where(device, dtype),) if kind == "kernel" else (rows.Where(device, dtype), min(512, longest))
            yield f"{kind}-{str(dtype).removeprefix('torch.')}", functools.partial(check, *given)


def timed(device: torch.device, lengths: list[int]) -> Iterator[Unit]:
    """All measurements; those that the goals need come first."""
    where = rows.Where(device, torch.bfloat16)
    first = [n for n in FIRST if n in lengths] or lengths[-1:]
    later = [n for n in lengths if n not in first]
    middle = first[0]
    sized: dict[str, Callable[..., Iterator[rows.Row]]] = {
        "tier": rows.tier, "training": rows.training_step, "forward": rows.layer_forward,
    }  # fmt: skip

    def layers(kind: str, n: int) -> Iterator[Unit]:
        for b in BATCHES:
            if n * b <= MOST_TOKENS:
                name = f"{kind}-{n}-by-{b}"
                yield name, lambda n=n, b=b: with_least_work(next(sized[kind]([n], where, n_batch=b)))

    yield "ceilings", lambda: ceilings(where)
    for n in first:
        yield f"attention-{n}", lambda n=n: attention_backends(where, n)
    for n in first:
        yield from layers("tier", n)
    yield from layers("training", middle)
    for b in BATCHES:
        yield f"compiled_training-{middle}-by-{b}", lambda b=b: compiled(where, middle, b, training=True)
    for n in sorted({min(1024, lengths[0]), *first}):
        yield f"decode-{n}", lambda n=n: next(rows.decode([n], where=where))
    yield from layers("forward", middle)
    for n in first:
        for share in SHARES:
            made = lambda n=n, share=share: with_least_work(next(rows.scores([n], (share,), where)))  # noqa: E731
            yield f"scores-{n}-{share:g}", made
    if device.type == "cuda":
        for b in BATCHES:
            yield f"launches-{middle}-by-{b}", lambda b=b: launches(where, middle, b)
    for n in later:
        for kind in sized:
            yield from layers(kind, n)
        yield f"decode-{n}", lambda n=n: next(rows.decode([n], where=where))
        yield f"scores-{n}-{rows.READ_FRAC:g}", lambda n=n: with_least_work(next(rows.scores([n], where=where)))
    for b in BATCHES:
        yield f"compiled-{middle}-by-{b}", lambda b=b: compiled(where, middle, b)


class OutOfTimeError(Exception):
    """A measurement took longer than it may."""


def measured(measure: Callable[[], dict[str, Any]], limit: int = UNIT_S) -> dict[str, Any]:
    """Returns the result of a measurement, or its error.

    A call that hangs in the driver ends the process, a while later.
    """

    def give_up(*_: Any) -> None:
        raise OutOfTimeError(f"took longer than {limit} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(limit)
    faulthandler.dump_traceback_later(limit + GRACE_S, exit=True)
    start = time.monotonic()
    try:
        found = measure()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = {"failed": f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:500]}"}
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return found | {"took_s": round(time.monotonic() - start, 1)}


def alive(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access no kernel of this process runs any more."""
    try:
        return bool((torch.ones(1, device=device) + 1 == 2).item())
    except RuntimeError:
        return False


def holds(out: Path, *names: str) -> bool:
    """Whether all of these checks were made and hold."""
    paths = [out / f"{name}.json" for name in names]
    return all(path.exists() and records.read_json(path).get("holds", False) for path in paths)


def main() -> int:
    """Returns 3 when time ran out before everything was measured, 4 when a check is red, 1 when the process breaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "accelerator", metavar="DIR")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--minutes", type=float, default=8.0, help="minutes after which nothing begins (default: 8)")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], metavar="N", help="greatest length, tokens")
    parser.add_argument("--only", action="append", metavar="NAME", help="checks and what begins so; may be repeated")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none; --device cpu makes a dry run")
    torch.backends.cuda.enable_cudnn_sdp(False)  # so that attention is FlashAttention; cuDNN's has a row of its own
    end = time.monotonic() + 60 * args.minutes
    lengths = [n for n in LENGTHS if n <= args.longest] or [args.longest]
    checked = list(checks(device, lengths[-1]))
    chosen = tuple(args.only or [""])
    for name, measure in [*checked, *(unit for unit in timed(device, lengths) if unit[0].startswith(chosen))]:
        path, kind = args.out / f"{name}.json", name.partition("-")[0]
        if path.exists():
            continue
        if time.monotonic() > end:
            print(f"out of time before {name}; call again to go on", file=sys.stderr)
            return 3
        with_kernels = kind == "kernel" or holds(args.out, "kernel-float32", "kernel-bfloat16")
        header = records.header(device) | {"kind": "timing", "name": name}
        header["fused_kernel"] = with_kernels and device.type == "cuda"
        write_json(path, header | {"failed": "did not come to an end"})  # which stands if the process dies
        if kind in NEEDS and not holds(args.out, f"{NEEDS[kind]}-bfloat16"):
            found = {"failed": f"not timed, as {NEEDS[kind]}-bfloat16 does not hold"}
        else:
            torch.manual_seed(0)
            with dispatch.switched(with_kernels):
                found = records.finite(measured(measure, UNITS_S.get(kind, UNIT_S)))
        write_json(path, header | found)
        medians = {way: round(spread["ms"]["median"], 3) for way, spread in found.get("ways", {}).items()}
        print(name, medians or found, file=sys.stderr, flush=True)
        if device.type == "cuda":
            if not alive(device):  # go on in a new process
                left = max(0.0, end - time.monotonic()) / 60
                os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(left)])
            torch.cuda.empty_cache()
    print(accelerator_page.section(args.out))
    return 0 if holds(args.out, *(name for name, _ in checked if device.type == "cuda" or "kernel" not in name)) else 4


if __name__ == "__main__":
    sys.exit(main())
