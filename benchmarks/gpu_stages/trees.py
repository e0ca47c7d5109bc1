"""Waves over random trees of segments, laid into pools whose every other slot is NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.kernels.segment_attention import BLOCK_ROWS, supports
from anabranch.runtime.attention import Block
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.task_plan import Capacity, Planned, Row, TaskLists, TaskPlanner

POSITIONS = 1 << 16
LISTS = ("tasks", "num_tasks", "task_rows", "task_pages", "page_start")


@dataclass(frozen=True, slots=True)
class Sizes:
    """prefix: tokens that all rows see; rows: of the wave; tails: the most tokens of each row's own; stitched: sealed
    siblings in the view of every third row, under shifts; heads: query, KV; chunk: tokens a task."""

    prefix: int
    rows: int
    tails: int
    heads: tuple[int, int]
    head_dim: int
    page_size: int = 16
    stitched: int = 0
    window: int = 0
    block_m: int = 0
    chunk: int = 1024
    head_first: bool = False

    @property
    def tile(self) -> int:
        """`block_m`, or the least tile that holds all rows."""
        group = self.heads[0] // self.heads[1]
        fitting = [m for m in BLOCK_ROWS if m >= group and supports(m, self.head_dim, torch.float16)]
        return self.block_m or next((m for m in fitting if m >= self.rows * group), fitting[-1])


@dataclass
class Wave:
    """pool, rows: on the host; k, v, q, positions, cos, sin, lengths: for the kernels, on the CPU."""

    sizes: Sizes
    pool: PagePool
    rows: list[Row]
    q: Tensor
    positions: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    lengths: Tensor

    def lists(self, dtype: torch.dtype) -> tuple[Planned, TaskLists]:
        """The planner's."""
        sizes = self.sizes
        block_m = sizes.tile if supports(sizes.tile, sizes.head_dim, dtype) else 64
        planner = TaskPlanner(
            page_size=sizes.page_size, rows_per_task=block_m * sizes.heads[1] // sizes.heads[0],
            capacity=(capacity := Capacity.for_rows(max(1, len(self.rows)))), chunk_tokens=sizes.chunk,
        )  # fmt: skip
        lists = TaskLists(capacity)
        planned = planner.plan(self.rows, 0, lists)
        if not isinstance(planned, Planned):
            raise RuntimeError(f"does not fit: {planned}")
        return planned, lists

    def blocks(self, counts: list[int]) -> list[Block]:
        """The newest `counts` tokens of each row as blocks to be prefilled."""
        return [
            Block(row.view, row.segment, row.segment.length - count, count)
            for row, count in zip(self.rows, counts, strict=True)
        ]


def wave(sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> Wave:
    """Rows of a fork behind one prefix; every third sees stitched siblings, too."""
    draw = random.Random(seed)
    size = sizes.page_size
    tokens = sizes.prefix + sizes.rows * (sizes.tails + 2 * size) + sizes.stitched * (sizes.tails + size)
    pool = PagePool(-(-tokens // size) + 8 + 2 * (sizes.rows + sizes.stitched), size)

    def segment(start: int, count: int) -> Segment:
        # Now and then from another place, so that pages do not follow one another.
        pool._cursor = draw.randrange(pool.num_pages)
        made = Segment(pool, start)
        made.append([0] * count)
        return made

    first = segment(0, sizes.prefix)
    first.seal()
    root = View(None, [Entry(first)])
    siblings = []
    for number in range(sizes.stitched):
        sibling = segment(sizes.prefix, draw.randrange(1, max(2, sizes.tails)))
        sibling.seal()
        # Two under each shift, so that a chunk holds segments that end in the middle of a page.
        siblings.append(Entry(sibling, 5 * (number // 2)))
    joined = View(root, siblings)
    rows = []
    for number in range(sizes.rows):
        view = joined if siblings and number % 3 == 0 else root
        own = segment(sizes.prefix + 7 * sizes.stitched, draw.randrange(1, sizes.tails + 1))
        own.reserve(own.length + size)
        rows.append(Row(view, own, (root,)))
    q, k, v = _pools(sizes, dtype, pool, rows, siblings, first, seed)
    at = [row.segment.start + row.segment.length - 1 for row in rows]
    cos, sin = tables(sizes.head_dim)
    return Wave(
        sizes, pool, rows, q, torch.tensor(at, dtype=torch.int32), k, v, cos, sin,
        torch.tensor([row.segment.length for row in rows], dtype=torch.int32),
    )  # fmt: skip


def _pools(
    sizes: Sizes, dtype: torch.dtype, pool: PagePool, rows: list[Row], siblings: list[Entry], first: Segment, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = sizes.heads
    shape = (pool.num_pages, num_kv_heads, sizes.page_size, sizes.head_dim)
    written = torch.zeros(pool.num_pages * sizes.page_size, dtype=torch.bool)
    for segment in (first, *(entry.segment for entry in siblings), *(row.segment for row in rows)):
        for begin, end in segment.runs():
            written[begin:end] = True
    unseen = ~written.view(pool.num_pages, 1, sizes.page_size, 1)
    made = []
    for _ in "kv":
        content = torch.randn(shape, generator=generator).masked_fill_(unseen, float("nan")).to(dtype)
        if sizes.head_first:
            content = content.transpose(0, 1).contiguous().transpose(0, 1)
        made.append(content)
    # As it lies in a fused projection's output.
    wide = torch.randn(len(rows), num_heads + 2 * num_kv_heads, sizes.head_dim, generator=generator).to(dtype)
    return wide[:, :num_heads], made[0], made[1]


def tables(head_dim: int, num_positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """cos and sin as the kernels take them."""
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def moved(x: Any, device: torch.device) -> Any:
    """A tensor on the device with the strides that it has here, whatever lies around it being NaN or 0."""
    if not isinstance(x, Tensor) or device.type == "cpu":
        return x
    if not x.is_contiguous():
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        )
        filling = float("nan") if x.is_floating_point() else 0
        whole = torch.full((span,), filling, dtype=x.dtype, device=device)
        return whole.as_strided(x.shape, x.stride()).copy_(x)
    return x.to(device)
