"""Batch invariance under `deterministic`: a row's logits alone, and among up to 63 others, are the same to the bit."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor

from anabranch.runtime.attention import Block
from anabranch.runtime.model import Decoder
from anabranch.runtime.pages import Entry, Segment, View
from gpu_stages.graphs import DTYPES, SHAPE
from gpu_stages.log import Figures, Log
from gpu_stages.rig import SHAPE_SMALL, Rig, decoder, release

COMPANY = (0, 1, 2, 4, 7, 15, 16, 31, 40, 63)


def run(log: Log) -> None:
    """Decoding and prefill, every type."""
    config = SHAPE_SMALL if log.small else SHAPE
    for dtype in DTYPES[1:2] if log.small else DTYPES:
        release()
        model = decoder(config, dtype, log.device)
        kind = str(dtype)[6:]
        length = 50 if log.small else 400
        log.case(f"decode, {kind}", partial(decoding, log, model))
        log.case(f"prefill, {kind}", partial(prefilling, log, model, length, (length, 128, 33, 16)))
        # What is left for the last step is one row, as a decoding one is.
        log.case(f"prefill, a row left over, {kind}", partial(prefilling, log, model, length, (length, length - 1)))


def decoding(log: Log, model: Decoder) -> Figures:
    """One row over a stitched view, in random company at random places."""
    lanes = 8 if log.small else 64
    rig = Rig(model, lanes=lanes, pages=4096, deterministic=True, run_ahead=0)
    draw = random.Random(0)
    vocab = model.config.vocab_size
    long = 45 if log.small else 1300

    def written(tokens: int, view: View | None) -> View:
        segment = Segment(rig.pool, 0 if view is None else view.total_tokens)
        rig.feed(segment, [draw.randrange(vocab) for _ in range(tokens)], view)
        segment.seal()
        return View(view, [Entry(segment)])

    prefix = written(long, None)
    views = [prefix, written(21, prefix), written(3, prefix), written(5, None)]
    # As branches: of a fork behind the prefix, of one further on, of another altogether.
    forks = [(prefix,), (prefix, views[1]), (prefix,), (views[3],)]
    lane = rig.lane(View(prefix, [*views[1].entries, *views[2].entries]), 9, forks=(prefix,))
    rig.feed(lane.segment, [draw.randrange(vocab) for _ in range(7)], lane.view)
    kept = lane.segment.length
    expected: Tensor | None = None
    different = 0
    companies = [others for others in COMPANY if others < lanes]
    for others in companies:
        company = []
        for _ in range(others):
            which = draw.randrange(len(views))
            other = rig.lane(views[which], draw.randrange(vocab), forks=forks[which])
            rig.feed(other.segment, [draw.randrange(vocab) for _ in range(draw.randrange(1, 40))], other.view)
            company.append(other)
        rig.waves.leave()
        lane.segment.trim(kept)
        lane.token, lane.drawn = 13, 0
        at = draw.randrange(others + 1)
        rig.step([*company[:at], lane, *company[at:]])
        assert lane.logits is not None
        found = lane.logits.float().cpu()
        expected = found if expected is None else expected
        different += not torch.equal(found, expected)
        for other in company:
            other.segment.drop()
    figures: Figures = {"companies": len(companies), "different": different, "block_m": rig.device.block_m}
    return figures | ({"error": f"{different} of {len(companies)} companies change the bits"} if different else {})


def prefilling(log: Log, model: Decoder, length: int, chunks: tuple[int, ...]) -> Figures:
    """The last row of a prompt, fed whole, in chunks of several sizes, and in one step with other prompts."""
    rig = Rig(model, lanes=4, pages=4096, deterministic=True)
    draw = random.Random(1)
    vocab = model.config.vocab_size
    prompt = [draw.randrange(vocab) for _ in range(length)]
    found: list[Tensor] = []
    for chunk in chunks:
        rig.chunk = chunk
        segment = Segment(rig.pool, 0)
        found.append(rig.feed(segment, prompt).cpu())
        segment.drop()
    for sizes in ((5,), (64, 17), (100, 1, 30, 2)):
        blocks, tokens = [], []
        segments = [Segment(rig.pool, 0) for _ in range(len(sizes) + 1)]
        for segment, part in zip(segments, [[draw.randrange(vocab)] * size for size in sizes] + [prompt], strict=True):
            at = segment.append(part)
            blocks.append(Block(None, segment, at.start, len(part)))
            tokens += part
        with torch.no_grad():
            found.append(rig.device.step(blocks).logits(tokens, [len(tokens) - 1])[0].cpu())
        for segment in segments:
            segment.drop()
    different = sum(not torch.equal(each, found[0]) for each in found)
    figures: Figures = {"ways": len(found), "different": different}
    return figures | ({"error": f"{different} of {len(found)} ways change the bits"} if different else {})
