"""Clocks of benchmarks, and work recorded as CUDA graphs; `cramlab.timing` times ways side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from cramlab.timing import Clock, core_ms, side_by_side

__all__ = ["Clock", "as_graphs", "core_ms", "cuda_ms", "graphed", "side_by_side"]


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
