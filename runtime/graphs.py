"""Launches as captured CUDA graphs, one for each number of rows and kind of sampling; plain calls on a CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

MAX_GRAPHS = 24
"""Kept at once, least recently used first to go: 7 sizes up to 64 lanes, of which a run uses a few kinds."""

Outputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
Launch: TypeAlias = Callable[[int, bool, bool], Outputs]


class Graphs:
    """Runs `launch(count, typed, penal)`, whose device work depends on its arguments alone.

    It is the owner's method, handed over with each call, so that nothing here holds the owner.

    On a GPU it is captured on first use and replayed from then on: outputs stand in the graphs' common memory, and the
    next replay writes over them. Numbers of rows are powers of two, or all lanes, so there are few graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: OrderedDict[tuple[int, bool, bool], tuple[torch.cuda.CUDAGraph, Outputs]] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None
        self.num_captured = 0

    def prepare(self, launch: Launch, count: int, typed: bool, penal: bool, quiet: Callable[[], None]) -> None:
        """Capture what `run` will replay, unless it is captured already.

        quiet: makes a launch change nothing, since the kernels must run once before they are captured
        """
        key = (count, typed, penal)
        if self._device.type != "cuda" or key in self._graphs:
            return
        quiet()
        if len(self._graphs) >= MAX_GRAPHS:
            # One that is still replayed must not lose its memory.
            torch.cuda.synchronize(self._device)
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs[key] = self._capture(launch, *key)
        self.num_captured += 1

    @torch.no_grad()
    def run(self, launch: Launch, count: int, typed: bool, penal: bool) -> Outputs:
        """The outputs of one launch."""
        if self._device.type != "cuda":
            return launch(count, typed, penal)
        key = (count, typed, penal)
        graph, outputs = self._graphs[key]
        self._graphs.move_to_end(key)
        graph.replay()
        return outputs

    @torch.no_grad()
    def _capture(self, launch: Launch, count: int, typed: bool, penal: bool) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side = self._stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # Compiles the kernels and lets libraries take their workspaces, neither of which can be captured.
            launch(count, typed, penal)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # On the same stream, whose workspaces were taken just now. Other threads may go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            outputs = launch(count, typed, penal)
        return graph, outputs
