"""Prefill attention against SDPA, in bf16 with the heads of an 8B model.

Threads that prefill behind one prefix. SDPA is given a batch, each with a copy of its own of the prefix, and causal
from the lower right. *TFLOP/s* counts two products over the keys that each row sees.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.kernels.segment_prefill import segment_prefill
from anabranch.runtime.attention import Block
from anabranch.runtime.device import PrefillLists
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from gpu_stages.log import Figures, Log
from gpu_stages.timing import cold_buffers, measure

DTYPE = torch.bfloat16
PAGE_SIZE = 16
TOLERANCE = 0.06
BLOCK_ROWS = (32, 64)


class Shape(NamedTuple):
    """threads, each of which feeds `rows` behind a prefix that all see."""

    prefix: int
    rows: int
    threads: int
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128

    @property
    def label(self) -> str:
        return f"{self.threads} x {self.rows} behind {self.prefix}"


SHAPES = (
    Shape(0, 2048, 1), Shape(0, 8192, 1), Shape(8192, 512, 1), Shape(32768, 512, 1), Shape(32768, 2048, 1),
    Shape(8192, 128, 16), Shape(32768, 64, 8), Shape(2048, 33, 15),
)  # fmt: skip
TINY = (Shape(0, 40, 1, (4, 2), 64), Shape(50, 9, 3, (4, 2), 64))


def run(log: Log) -> None:
    """Every shape with every tile, and SDPA beside it."""
    for shape in TINY if log.small else SHAPES:
        for block_m in BLOCK_ROWS:
            log.case(f"{shape.label}, block_m {block_m}", partial(ours, log.device, shape, block_m))
        log.case(f"{shape.label}, SDPA", partial(theirs, log.device, shape))
        best = min(log.rows[f"{shape.label}, block_m {m}"]["us"] for m in BLOCK_ROWS)
        peer = log.rows[f"{shape.label}, SDPA"]
        if "us" in peer:
            log.headlines[f"{shape.label}: SDPA to ours"] = peer["us"] / best


class Case:
    """One shape on the device. pools: (K, V) that calls rotate over."""

    def __init__(self, device: torch.device, shape: Shape) -> None:
        pool = PagePool((shape.prefix + shape.threads * (shape.rows + PAGE_SIZE)) // PAGE_SIZE + 2, PAGE_SIZE)
        view: View | None = None
        self.shape = shape
        self.segments: list[Segment] = []
        if shape.prefix:
            first = Segment(pool, 0)
            first.append([0] * shape.prefix)
            first.seal()
            view = View(None, [Entry(first)])
            self.segments.append(first)
        blocks = []
        for number in range(shape.threads):
            own = Segment(pool, shape.prefix)
            own.append([0] * shape.rows)
            self.segments.append(own)
            blocks.append((number * shape.rows, Block(view, own, 0, shape.rows)))
        self.plan = PrefillLists(blocks, PAGE_SIZE, device)
        generator = torch.Generator(device).manual_seed(0)
        size = (pool.num_pages, shape.heads[1], PAGE_SIZE, shape.head_dim)
        num_bytes = 2 * DTYPE.itemsize * pool.num_pages * shape.heads[1] * PAGE_SIZE * shape.head_dim

        def random(*size: int) -> Tensor:
            return torch.randn(size, dtype=DTYPE, device=device, generator=generator)

        self.pools = [(random(*size), random(*size)) for _ in range(min(8, cold_buffers(num_bytes, device)))]
        self.q = random(shape.threads * shape.rows, shape.heads[0], shape.head_dim)
        at = torch.arange(shape.rows, dtype=torch.int32, device=device) + shape.prefix
        self.positions = at.repeat(shape.threads)
        # Angles of 0: SDPA takes no rotated queries then.
        self.cos = torch.ones(shape.prefix + shape.rows, shape.head_dim // 2, device=device)
        self.sin = torch.zeros_like(self.cos)

    def call(self, block_m: int, k: Tensor, v: Tensor) -> Tensor:
        """Ours over one pool."""
        plan = self.plan
        return segment_prefill(
            self.q, self.positions, k, v, self.cos, self.sin, plan.blocks, plan.num_blocks, plan.spans, plan.task_pages,
            plan.page_start, scale=self.shape.head_dim**-0.5, block_m=block_m,
        )[0]  # fmt: skip

    def figures(self, seconds: float) -> Figures:
        """The time, and what is done in it."""
        shape = self.shape
        seen = shape.threads * (shape.rows * shape.prefix + shape.rows * (shape.rows + 1) // 2)
        work = 4 * seen * shape.heads[0] * shape.head_dim
        return {"us": seconds * 1e6, "tflop_s": work / seconds / 1e12}


def ours(device: torch.device, shape: Shape, block_m: int) -> Figures:
    """segment_prefill."""
    case = Case(device, shape)
    time = measure([partial(case.call, block_m, k, v) for k, v in case.pools], device)
    return case.figures(time.median_s) | {"buffers": len(case.pools)}


def theirs(device: torch.device, shape: Shape) -> Figures:
    """SDPA over copies."""
    from torch.nn.attention.bias import causal_lower_right

    case = Case(device, shape)
    has_prefix = bool(shape.prefix)
    slots = [torch.cat([torch.arange(a, b) for a, b in segment.runs()]).to(device) for segment in case.segments]
    index = [torch.cat([slots[0], own]) for own in slots[1:]] if has_prefix else slots
    group = shape.heads[0] // shape.heads[1]
    q = case.q.view(shape.threads, shape.rows, shape.heads[0], shape.head_dim).transpose(1, 2)
    bias = causal_lower_right(shape.rows, shape.prefix + shape.rows)

    def copied(pool: Tensor) -> Tensor:
        flat = pool.transpose(1, 2).reshape(-1, shape.heads[1], shape.head_dim)
        # Heads are repeated, since not every version of the biased call groups them; the products are as many.
        return torch.stack([flat[each].transpose(0, 1) for each in index]).repeat_interleave(group, dim=1)

    def call(k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    try:
        pairs = [(copied(k), copied(v)) for k, v in case.pools[:2]]
        found = call(*pairs[0]).transpose(1, 2).reshape(case.q.shape)
        time = measure([partial(call, k, v) for k, v in pairs], device)
    except Exception as error:
        # What keeps a peer from running is no failure of ours; a broken card shows here.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {"skipped": f"{type(error).__name__}: {str(error)[:200]}"}
    off = float((found.float() - case.call(64, *case.pools[0]).float()).abs().max())
    figures = case.figures(time.median_s) | {"off": off}
    return figures | ({} if off <= TOLERANCE else {"error": f"differs from ours by {off:.3g}"})
