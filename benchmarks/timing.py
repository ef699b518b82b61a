"""Times several ways of doing one thing, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[Callable[[], Any]], float]


def core_ms(work: Callable[[], Any]) -> float:
    """Milliseconds that this process had a core for, so that others on the machine cost little more than cache.

    For work on one thread the same as the clock's on a quiet machine.
    """
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def cuda_ms(work: Callable[[], Any]) -> float:
    """Milliseconds on the current CUDA stream, launches that it waits for included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def side_by_side(
    ways: dict[str, Callable[[], Any]], *, repeats: int, warmups: int = 1, clock: Clock = core_ms
) -> dict[str, dict[str, Any]]:
    """Calls each way in turn, again and again, so that a change of the machine's load hits all of them.

    Args:
        ways: by name; the first is the one that the others are compared with.
        repeats: timed calls of each.
        warmups: untimed calls of each before.
        clock: `core_ms` or `cuda_ms`.

    Returns:
        By name: median, 10th and 90th percentile in ms, number of repeats, and the ratio of the first way's time to
        this one's in the same round (median and both percentiles): above 1, this one is faster.
    """
    for _ in range(warmups):
        for way in ways.values():
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(clock(way))
    base = times[next(iter(ways))]
    return {
        name: {
            "repeats": repeats,
            "ms": _spread(own),
            "speedup": _spread([b / o for b, o in zip(base, own, strict=True)]),
        }
        for name, own in times.items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Median and the percentiles around it; with fewer than ten values, the least and the greatest."""
    values = sorted(values)
    low, high = (values[0], values[-1]) if len(values) < 10 else (
        statistics.quantiles(values, n=10)[0], statistics.quantiles(values, n=10)[-1]
    )  # fmt: skip
    return {"p10": low, "median": statistics.median(values), "p90": high}
