"""Times several ways of doing one thing, side by side in one run."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Clock = Callable[[Callable[[], Any]], float]


def core_ms(work: Callable[[], Any]) -> float:
    """CPU milliseconds of this process, which other processes on the machine change little.

    For work on one thread the same as the clock's on a quiet machine.
    """
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def wall_ms(device: torch.device) -> Clock:
    """A clock that returns the milliseconds that a user waits, work queued on a CUDA device included."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def clock(work: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return 1e3 * (time.perf_counter() - start)

    return clock


def side_by_side(
    ways: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmups: int = 1,
    clock: Clock = core_ms,
    around: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, dict[str, Any]]:
    """Calls the ways in turn, repeatedly, so that a change of the machine's load affects all of them.

    Args:
        ways: by name; the first is the one that the others are compared with.
        repeats: timed calls of each.
        warmups: untimed calls of each before.
        clock: `core_ms`, `wall_ms(device)`, or any other that calls its argument once.
        around: makes a context from a way's name, which is entered before each of its calls; its time does not count.

    Returns:
        By name: median, 10th and 90th percentile in ms, number of repeats, and the ratio of the first way's time to
        this one's in the same round (median and both percentiles): above 1, this one is faster.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(warmups + repeats):
        for name, way in ways.items():
            with around(name):
                if i < warmups:
                    way()
                else:
                    times[name].append(clock(way))
    base = times[next(iter(ways))]
    return {
        name: {
            "repeats": repeats,
            "ms": spread(own),
            "speedup": spread([b / o for b, o in zip(base, own, strict=True)]),
        }
        for name, own in times.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and the percentiles around it; with fewer than ten values, the least and the greatest."""
    values = sorted(values)
    low, high = (values[0], values[-1]) if len(values) < 10 else (
        statistics.quantiles(values, n=10)[0], statistics.quantiles(values, n=10)[-1]
    )  # fmt: skip
    return {"p10": low, "median": statistics.median(values), "p90": high}
