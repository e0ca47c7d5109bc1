"""Host time from the last token known to the next launch, at a fork and at a stitch, beside prefilling the same again.

The time runs from the return of the step that gave the last token: segments are sealed, views made, lanes seated,
lists planned and their copies started. It ends where the next launch is asked for. No token is flushed: what a stitch
may have to feed of its branches' last tokens is a launch of its own.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import torch

from anabranch.runtime.model import Decoder
from anabranch.runtime.pages import Entry, Segment, View
from gpu_stages.log import Figures, Log
from gpu_stages.rig import SHAPE_06B, SHAPE_SMALL, Rig, Watched, decoder, release

DTYPE = torch.bfloat16
BRANCHES = 16


def run(log: Log) -> None:
    """Branches of several lengths over one prefix; the length must not matter."""
    prefix, lengths, repeats = (2048, (64, 512, 2048), 20)
    if log.small:
        prefix, lengths, repeats = (100, (8, 40), 3)
    model = decoder(SHAPE_SMALL if log.small else SHAPE_06B, DTYPE, log.device)
    for length in lengths:
        log.case(f"{BRANCHES} branches of {length}", partial(times, model, prefix, length, repeats))
    rows = [log.rows[f"{BRANCHES} branches of {length}"] for length in lengths]
    log.target(f"join of {BRANCHES} branches to the next launch, us", max(r["join_us"] for r in rows), "at most", 200.0)
    log.target("join, the longest branches to the shortest", rows[-1]["join_us"] / rows[0]["join_us"], "at most", 1.5)
    log.headlines["prefilling the branches again, to a join"] = [r["prefill_us"] / r["join_us"] for r in rows]


def times(model: Decoder, prefix: int, length: int, repeats: int) -> Figures:
    """Medians in microseconds."""
    release()
    pages = (prefix + 2 * BRANCHES * (length + 96)) // 16 + 2 * BRANCHES + 512
    rig = Rig(model, lanes=BRANCHES, pages=pages, run_ahead=1)
    rig.fill()
    launched: list[float] = []
    rig.graphs = Watched(rig.graphs, lambda: launched.append(time.perf_counter()))
    base = rig.written(prefix)
    forks, joins = [], []
    for repeat in range(repeats + 2):
        parent = rig.lane(base, 5)
        rig.step([parent])
        launched.clear()
        begin = time.perf_counter()
        parent.segment.seal()
        view = View(base, [Entry(parent.segment)])
        branches = [rig.lane(view, token, forks=(view,)) for token in range(1, BRANCHES + 1)]
        rig.step(branches)
        fork = launched[0] - begin
        rig.waves.leave()
        for branch in branches:
            # As if they had been decoded: what they hold is not looked at.
            branch.segment.append([0] * (length - branch.segment.length - 2))
        rig.step(branches)
        launched.clear()
        begin = time.perf_counter()
        for branch in branches:
            branch.segment.seal()
        stitched = View(view, [Entry(branch.segment) for branch in branches])
        parent = rig.lane(stitched, 6, start=view.total_tokens + length)
        rig.step([parent])
        join = launched[0] - begin
        rig.waves.leave()
        if repeat >= 2:
            # Those before compiled and captured.
            forks.append(fork)
            joins.append(join)
        # The lists of what is gone would fill up, as they do not where an engine goes on to other segments.
        parent.segment.drop()
        stitched.drop()
        for branch in branches:
            branch.segment.drop()
        view.drop()
    return {
        "fork_us": median(forks) * 1e6, "join_us": median(joins) * 1e6,
        "prefill_us": _prefilled(rig, base, BRANCHES * length) * 1e6,
    }  # fmt: skip


def _prefilled(rig: Rig, view: View, tokens: int) -> float:
    """Seconds to feed as many tokens as the branches hold."""
    found = []
    for _ in range(3):
        segment = Segment(rig.pool, view.total_tokens)
        begin = time.perf_counter()
        rig.feed(segment, [1] * tokens, view).cpu()
        found.append(time.perf_counter() - begin)
        segment.drop()
    return min(found)
