"""Times several ways of doing one thing, side by side in one run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
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


def cuda_ms(work: Callable[[], Any]) -> float:
    """Milliseconds of a call on the current CUDA stream, including launches that it waits for.

    Short ones are called ten times in a row, as they would be in use, so that the first launch is not most of it.
    """
    once = _cuda_ms(work, 1)
    return once if once > 2 else _cuda_ms(work, 10)


def _cuda_ms(work: Callable[[], Any], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def graphed(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work recorded once as a CUDA graph, whose launches cost the CPU almost nothing.

    The work must not wait for the device. What it returns lies in memory that the next call overwrites. A graph knows
    its inputs by their addresses alone, so whatever the work refers to is kept as long as the replay.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # kernels are compiled and workspaces taken outside of the recording
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return functools.partial(_replay, graph, work)


def _replay(graph: torch.cuda.CUDAGraph, kept: Callable[[], Any]) -> None:  # noqa: ARG001
    graph.replay()


def as_graphs(works: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The ways that can be recorded, by name, and the errors of the others."""
    graphs, failed = {}, {}
    for name, work in works.items():
        try:
            graphs[f"{name}, as a graph"] = graphed(work)
        except RuntimeError as error:
            failed[f"{name}, as a graph"] = f"{type(error).__name__}: {str(error)[:500]}"
    return graphs, {"failed_ways": failed} if failed else {}


def side_by_side(
    ways: dict[str, Callable[[], Any]], *, repeats: int, warmups: int = 1, clock: Clock = core_ms
) -> dict[str, dict[str, Any]]:
    """Calls the ways in turn, repeatedly, so that a change of the machine's load affects all of them.

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
    """Median with 10th and 90th percentiles; with fewer than ten values, minimum and maximum."""
    values = sorted(values)
    low, high = (values[0], values[-1]) if len(values) < 10 else (
        statistics.quantiles(values, n=10)[0], statistics.quantiles(values, n=10)[-1]
    )  # fmt: skip
    return {"p10": low, "median": statistics.median(values), "p90": high}
