"""Time on the device: calls captured in one graph, over buffers that do not fit the cache together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

REPEATS = 10
COLD = 4
"""Calls rotate over buffers of so many times the L2: when one comes round again, nothing of it is left there."""
MOST_CALLS = 64
"""Captured at once."""
COPIED_BYTES = 1 << 30


class Time(NamedTuple):
    """Seconds of one call: the median and the least of the repetitions. captured: whether the calls were a graph."""

    median_s: float
    least_s: float
    captured: bool


def cold_buffers(num_bytes: int, device: torch.device) -> int:
    """How many buffers of `num_bytes` calls must rotate over."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_CALLS, -(-COLD * cache // max(1, num_bytes))))


@torch.no_grad()
def measure(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = REPEATS) -> Time:
    """The time of one of `calls`, which are run in turn; each has buffers of its own."""
    if device.type != "cuda":
        return Time(*_summary([_host_time(calls) for _ in range(3)], len(calls)), False)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        # Compiles, and lets libraries take their workspaces.
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What a call returns is kept, or the next call could be given its memory, which is in the cache.
        kept = [call() for call in calls]
    graph.replay()
    found = [_device_time(graph.replay, device) for _ in range(repeats)]
    del kept, graph
    return Time(*_summary(found, len(calls)), True)


@torch.no_grad()
def measure_eagerly(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = REPEATS) -> Time:
    """As `measure` for what cannot be captured: launches may count, too."""
    if device.type != "cuda":
        return measure(calls, device)

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()
    return Time(*_summary([_device_time(all_of_them, device) for _ in range(repeats)], len(calls)), False)


def copy_bandwidth(device: torch.device, small: bool = False) -> float:
    """Bytes read and written a second by a copy that is much larger than the cache: the best of the repetitions."""
    size = (1 << 20) if small else COPIED_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    time = measure([lambda: into.copy_(source)], device)
    return 2 * size / time.least_s


def _device_time(call: Callable[[], object], device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def _host_time(calls: Sequence[Callable[[], object]]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin


def _summary(found: list[float], num_calls: int) -> tuple[float, float]:
    return statistics.median(found) / num_calls, min(found) / num_calls
