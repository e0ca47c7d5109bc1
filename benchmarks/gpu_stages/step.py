"""A decode step of a whole model, as the wave executor replays it, against the roofline.

The roofline is the time that the bytes which must be read (weights once, each KV byte that some row sees once) take at
the measured bandwidth of a large copy. The weights alone are many times the cache, so every step is cold. One engine of
64 lanes serves all numbers of branches: its tile does not change with them.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import torch

from anabranch.runtime.config import ModelConfig
from anabranch.runtime.model import Decoder
from gpu_stages.log import Figures, Log
from gpu_stages.rig import (
    SHAPE_06B,
    SHAPE_8B,
    SHAPE_SMALL,
    SHAPE_TINY,
    Lane,
    Rig,
    Watched,
    decoder,
    release,
    token_bytes,
    weight_bytes,
)
from gpu_stages.timing import copy_bandwidth

DTYPE = torch.bfloat16
TAIL = 64
"""Tokens that each branch has of its own when the timing begins."""
STEPS = 32
"""Timed; within the pages that are laid out ahead."""


def run(log: Log) -> None:
    """Both shapes; the prefixes and widths of the targets come first."""
    shapes = (("8B", SHAPE_8B), ("0.6B", SHAPE_06B))
    prefixes, widths, lanes = (32768, 8192, 2048), (1, 16, 64, 4, 2, 8, 32), 64
    if log.small:
        shapes, prefixes, widths, lanes = (("8B", SHAPE_SMALL), ("0.6B", SHAPE_TINY)), (2048, 1024), (1, 4), 4
    copied = log.case("copy", lambda: {"bytes_s": copy_bandwidth(log.device, log.small)})["bytes_s"]
    for name, config in shapes:
        model: Decoder | None = None
        for prefix in prefixes:
            for width in widths:
                case = f"{name}, {prefix} x {width}"
                if case not in log.rows and model is None:
                    model = decoder(config, DTYPE, log.device)
                if model is not None:
                    log.case(case, partial(step, model, config, prefix, width, lanes, copied, log.small))
        rows = {(p, w): log.rows[f"{name}, {p} x {w}"]["replay_us"] for p in prefixes for w in widths}
        many = 4 if log.small else 16
        for prefix in prefixes:
            ratio = rows[prefix, many] / rows[prefix, 1]
            log.headlines[f"{name}, {prefix}: a step of {many} branches to one of 1"] = ratio
        if name == "8B":
            ratio = rows[max(prefixes), many] / rows[max(prefixes), 1]
            log.target(f"step, 8B at {max(prefixes)}: {many} branches to 1", ratio, "at most", 1.15)
        del model


def step(
    model: Decoder, config: ModelConfig, prefix: int, width: int, lanes: int, copied: float, small: bool
) -> Figures:
    """Microseconds of a replay, and of a step as an engine takes it, host included."""
    release()
    tail, steps = (3, 2) if small else (TAIL, STEPS)
    room = tail + 3 * steps + 8
    pages = prefix // 16 + lanes * (-(-room // 16) + 8) + 64
    rig = Rig(model, lanes=lanes, pages=pages, run_ahead=2)
    rig.graphs = watched = Watched(rig.graphs)
    rig.fill()
    view = rig.written(prefix)
    branches = [rig.lane(view, token, forks=(view,)) for token in range(1, width + 1)]
    for lane in branches:
        lane.segment.append([0] * tail)
    rig.reserve(branches, room - tail)
    wall = _stepped(rig, branches, steps)
    held = sum(lane.segment.length for lane in branches)
    replay = _replayed(watched, rig.device.device, steps)
    read = weight_bytes(config, DTYPE) + (prefix + held) * token_bytes(config, DTYPE)
    roofline = read / copied
    return {
        "replay_us": replay * 1e6, "step_us": wall * 1e6, "roofline_us": roofline * 1e6,
        "of_roofline": roofline / replay, "tokens_s": width / wall, "block_m": rig.device.block_m,
        "graphs": watched.num_graphs,
    }  # fmt: skip


def _stepped(rig: Rig, branches: list[Lane], steps: int) -> float:
    """Seconds of a step through the executor, two ahead of the host."""
    for _ in range(3):
        rig.step(branches)
    _wait(rig.device.device)
    begin = time.perf_counter()
    for _ in range(steps):
        rig.step(branches)
    _wait(rig.device.device)
    return (time.perf_counter() - begin) / steps


def _replayed(launches: Watched, device: torch.device, steps: int) -> float:
    """Seconds of a launch by itself. Lanes go on within their pages; the host hears nothing of it."""
    found = []
    for _ in range(steps):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launches.again()
            end.record()
            torch.cuda.synchronize(device)
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            launches.again()
            found.append(time.perf_counter() - begun)
    return median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
