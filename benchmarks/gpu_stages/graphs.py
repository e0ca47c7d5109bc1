"""Waves in captured graphs against the same run eagerly, and run-ahead against none.

Lanes fork from a prefix, run past a horizon, some leave, two are stitched and their parent goes on in another lane.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from anabranch.runtime.model import Decoder
from anabranch.runtime.pages import Entry, Segment, View
from gpu_stages.log import Figures, Log
from gpu_stages.rig import SHAPE_SMALL, Eager, Rig, Watched, decoder, release, shape

SHAPE = shape(layers=4, hidden=1024, heads=(16, 8), head_dim=128, ff=3072, vocab=32000, context=1 << 13, qk_norm=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES = 16


def run(log: Log) -> None:
    """Every type, with free and with fixed linears."""
    config = SHAPE_SMALL if log.small else SHAPE
    for dtype in DTYPES[1:2] if log.small else DTYPES:
        model = decoder(config, dtype, log.device)
        for deterministic in (False, True):
            name = f"{str(dtype)[6:]}{' deterministic' * deterministic}"
            log.case(name, partial(compare, log, model, deterministic))


def compare(log: Log, model: Decoder, deterministic: bool) -> Figures:
    """The plain run, eager and with nothing ahead, against all others."""
    # Past a horizon of 64 tokens, and a prefix of more than one chunk.
    steps, prompt = (6, 37) if log.small else (80, 1100)
    expected_tokens, expected_logits, _ = play(model, deterministic, 0, steps, prompt, eager=True)
    figures: Figures = {}
    for eager, ahead in ((True, 1), (False, 0), (False, 1), (False, 2)):
        tokens, logits, facts = play(model, deterministic, ahead, steps, prompt, eager=eager)
        kind = f"{'eager' if eager else 'graphs'}, run-ahead {ahead}"
        if tokens != expected_tokens:
            figures["error"] = f"{kind}: other tokens"
        off = max(float((a - b).abs().max()) for a, b in zip(logits, expected_logits, strict=True))
        if deterministic and off:
            figures["error"] = f"{kind}: logits are off by up to {off:.2e}"
        figures[f"off, {kind}"] = off
        figures |= facts
    if log.device.type == "cuda" and not figures["graphs"]:
        figures["error"] = "nothing was captured"
    return figures


def play(
    model: Decoder, deterministic: bool, ahead: int, steps: int, prompt_tokens: int, *, eager: bool
) -> tuple[list[list[int]], list[Tensor], Figures]:
    """Each lane's tokens, the logits of each draw, and what the captured graphs take."""
    release()
    rig = Rig(model, lanes=LANES, pages=2048, deterministic=deterministic, run_ahead=ahead)
    watched = Watched(Eager(rig.device.device) if eager else rig.graphs)
    rig.graphs = watched
    prompt = Segment(rig.pool, 0)
    rig.feed(prompt, [(7 * i + 3) % model.config.vocab_size for i in range(prompt_tokens)])
    prompt.seal()
    prefix = View(None, [Entry(prompt)])
    lanes = [rig.lane(prefix, token, forks=(prefix,)) for token in range(1, 8)]
    everyone = list(lanes)
    logits: list[Tensor] = []

    def go(count: int) -> None:
        for _ in range(count):
            logits.extend(drawn.logits.float().cpu() for drawn in rig.step(lanes))

    go(steps)
    gone, lanes = lanes[:3], lanes[3:]
    go(steps // 3)
    for lane in gone[:2]:
        lane.segment.seal()
    stitched = View(prefix, [Entry(lane.segment) for lane in gone[:2]])
    end = max(lane.segment.start + lane.segment.length for lane in gone[:2])
    lanes.insert(0, rig.lane(stitched, 11, start=end))
    everyone.append(lanes[0])
    go(steps // 2)
    facts: Figures = {"launches": rig.waves.num_launches, "dropped": rig.waves.rows_dropped}
    if not eager:
        facts |= {"graphs": watched.num_graphs, "graphs_mib": watched.captured_bytes / 2**20}
    return [lane.tokens for lane in everyone], logits, facts
