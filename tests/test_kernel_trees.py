"""The published trees, scaled down: planned, run by the kernels in Triton's interpreter, held against a dense softmax.

The full sizes are planned and their bytes counted by `benchmarks/bytes.py`.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, run_in_interpreter, starts_interpreter

from anabranch.kernels.segment_attention import segment_attention_torch
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.task_plan import Capacity, Planned, Row, TaskLists, TaskPlanner

PAGE_SIZE = 16
HEAD_DIM = 64

# (nodes, tokens of each, query heads, KV heads): depth by depth, every leaf a row.
TREES = {
    "hydragen 8/1": ((1, 12), (100, 7), 8, 1),
    "hydragen 8/8": ((1, 9), (70, 3), 8, 8),
    "fasttree 1,4,16,512 at 16/1": ((1, 2, 4, 12), (64, 32, 16, 4), 16, 1),
    "fasttree 1,4,16,512 at 32/8": ((1, 2, 4, 8), (40, 17, 9, 4), 8, 2),
    "fasttree 1,10 at 32/32": ((1, 5), (90, 21), 4, 4),
    "fasttree 1,256 at 16/1": ((1, 20), (32, 4), 16, 1),
    "flashinfer cascade": ((1, 17), (80, 5), 8, 2),
}


@starts_interpreter
def test_in_the_interpreter() -> None:
    """The trees below pass in it."""
    printed = run_in_interpreter(__file__)
    assert f"{2 * len(TREES)} passed" in printed, printed


def grow(nodes: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[PagePool, list[Row], list[list[Segment]]]:
    """The leaves as rows, and the segments that each sees."""
    pool = PagePool(sum(n * (-(-t // PAGE_SIZE) + 1) for n, t in zip(nodes, tokens, strict=True)), PAGE_SIZE)
    level: list[tuple[tuple[View, ...], list[Segment]]] = [((), [])]
    start = 0
    for count, length in zip(nodes[:-1], tokens[:-1], strict=True):
        grown = []
        for node in range(count):
            forks, above = level[node * len(level) // count]
            segment = Segment(pool, start)
            segment.append([0] * length)
            segment.seal()
            grown.append(((*forks, View(forks[-1] if forks else None, [Entry(segment)])), [*above, segment]))
        level = grown
        start += length
    rows, seen = [], []
    for node in range(nodes[-1]):
        forks, above = level[node * len(level) // nodes[-1]]
        segment = Segment(pool, start)
        segment.append([0] * tokens[-1])
        rows.append(Row(forks[-1], segment, forks))
        seen.append([*above, segment])
    return pool, rows, seen


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", TREES)
def test_a_published_tree(name: str, dtype: torch.dtype) -> None:
    """Planned and run by both kernels, each row's output is one softmax over all that it sees; the rest is NaN."""
    from anabranch.kernels.merge_states_triton import launch_merge_parts, merge_parts_kernel
    from anabranch.kernels.segment_attention_triton import launch_segment_attention, segment_attention_kernel

    nodes, tokens, num_heads, num_kv_heads = TREES[name]
    pool, rows, seen = grow(nodes, tokens)
    generator = torch.Generator().manual_seed(7)
    capacity = Capacity.for_rows(len(rows), tasks=256, pages=1024, parts=2048)
    group = num_heads // num_kv_heads
    planner = TaskPlanner(page_size=PAGE_SIZE, rows_per_task=16 // group, capacity=capacity, chunk_tokens=32)
    lists = TaskLists(capacity)
    planned = planner.plan(rows, 0, lists)
    assert isinstance(planned, Planned)
    shape = (pool.num_pages, num_kv_heads, PAGE_SIZE, HEAD_DIM)
    k, v = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
    for segment in {segment for view in seen for segment in view}:
        for index in range(segment.length):
            page, slot = divmod(segment.slot(index), PAGE_SIZE)
            for pool_of in (k, v):
                pool_of[page, :, slot] = torch.randn(num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
    q = torch.randn(len(rows), num_heads, HEAD_DIM, generator=generator).to(dtype)
    positions = torch.tensor([row.segment.start + row.segment.length - 1 for row in rows], dtype=torch.int32)
    angles = torch.arange(512)[:, None] * 10000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = angles.cos(), angles.sin()
    lengths = torch.tensor([row.segment.length for row in rows], dtype=torch.int32)
    arrays = (lists.tasks, lists.num_tasks, lists.task_rows, lists.task_pages, lists.page_start)
    arguments = (q, positions, k, v, cos, sin, *map(torch.from_numpy, arrays), lengths)
    out = torch.zeros(planned.parts, num_heads, HEAD_DIM)
    lse = torch.zeros(planned.parts, num_heads)
    scale = HEAD_DIM**-0.5
    launch_segment_attention(
        segment_attention_kernel, *arguments, out, lse, scale=scale, window=0, block_m=16
    )  # fmt: skip
    expected, expected_lse = segment_attention_torch(*arguments, planned.parts, scale, 0, 16)
    tolerance = 3e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=tolerance)
    merged = torch.zeros(len(rows), num_heads, HEAD_DIM, dtype=dtype)
    indptr = torch.from_numpy(lists.row_parts_indptr[: len(rows) + 1].copy())
    launch_merge_parts(
        merge_parts_kernel,
        out,
        lse,
        indptr,
        torch.from_numpy(lists.row_parts),
        merged,
        torch.zeros(len(rows), num_heads),
    )
    for row, view in enumerate(seen):
        slots = torch.tensor([segment.slot(index) for segment in view for index in range(segment.length)])
        keys, values = (
            x[slots // PAGE_SIZE, :, slots % PAGE_SIZE].transpose(0, 1).float().repeat_interleave(group, 0)
            for x in (k, v)
        )
        low, high = q[row].float().chunk(2, dim=-1)
        c, s = cos[positions[row]], sin[positions[row]]
        query = torch.cat((low * c - high * s, high * c + low * s), -1).to(dtype).float()
        weight = (torch.einsum("hd,hkd->hk", query, keys) * scale).softmax(-1)
        found = torch.einsum("hk,hkd->hd", weight, values)
        torch.testing.assert_close(merged[row].float(), found, rtol=0, atol=tolerance)
