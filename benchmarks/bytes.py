"""Bytes that decode attention reads and writes in one layer, counted from the planner's task lists.

    python benchmarks/bytes.py [--chunk 1024]

Nothing runs on a device. Each wave is built as views over a page pool and planned; `read` is what its tasks read of K
and V, `unique` what the shape says there is (nodes x tokens), and `per branch` what one attention call a row would
read, as multiples of `unique`. Partial states (fp32, written once and read once) and q and o are counted apart, in
percent of `read`. K, V, q and o have 16 bits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from anabranch.kernels.segment_attention import TASK_FIRST, TASK_LENGTH, TASK_NUM_ROWS, TASK_SEGMENT
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.task_plan import CHUNK_TOKENS, Capacity, Planned, Row, TaskLists, TaskPlanner

PAGE_SIZE = 16
ELEMENT_BYTES = 2
STATE_BYTES = 4
# Rows x query heads of the widest tile: the sm_90 matrix instruction's 64 twice.
WIDEST_TILE = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree with `nodes[i]` nodes of `tokens[i]` tokens at depth i; every leaf is a row. heads: query, KV."""

    name: str
    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int = 128


def hydragen() -> list[Shape]:
    """Juravsky et al. 2024: 8 query heads; 128 tokens of each row's own are our choice."""
    return [
        Shape(f"Hydragen {prefix} x {batch}", (1, batch), (prefix, 128), (8, kv))
        for kv in (1, 8)
        for prefix, batch in ((1024, 64), (2048, 256), (16384, 256), (16384, 1024))
    ]


def fasttree() -> list[Shape]:
    """The trees of FastTree's benchmark."""
    trees = (((1, 4, 16, 512), (1024, 256, 128, 32)), ((1, 10), (4000, 400)), ((1, 256), (256, 32)))
    return [
        Shape(f"FastTree {','.join(map(str, nodes))}", nodes, tokens, heads)
        for nodes, tokens in trees
        for heads in ((16, 1), (32, 8), (32, 32))
    ]


def others() -> list[Shape]:
    """FlashInfer's cascade example (heads are our choice), and the 8B shape with 64 tokens of each row's own."""
    cascade = Shape("FlashInfer cascade", (1, 17), (2048, 37), (32, 8))
    sizes = ((2048, 16), (8192, 1), (8192, 16), (8192, 64), (32768, 1), (32768, 16), (32768, 64))
    return [cascade, *(Shape(f"8B {prefix} x {rows}", (1, rows), (prefix, 64), (32, 8)) for prefix, rows in sizes)]


def wave(shape: Shape) -> list[Row]:
    """The leaves of the tree as rows of a wave."""
    num_pages = sum(n * (-(-t // PAGE_SIZE) + 1) for n, t in zip(shape.nodes, shape.tokens, strict=True))
    pool = PagePool(num_pages, PAGE_SIZE)
    # Every node above the leaves is a thread that waits at its fork.
    forks: list[tuple[View, ...]] = [()]
    start = 0
    for nodes, tokens in zip(shape.nodes[:-1], shape.tokens[:-1], strict=True):
        grown: list[tuple[View, ...]] = []
        for node in range(nodes):
            segment = Segment(pool, start)
            segment.append([0] * tokens)
            segment.seal()
            above = forks[node * len(forks) // nodes]
            grown.append((*above, View(above[-1] if above else None, [Entry(segment)])))
        forks = grown
        start += tokens
    rows = []
    for node in range(shape.nodes[-1]):
        segment = Segment(pool, start)
        segment.append([0] * shape.tokens[-1])
        above = forks[node * len(forks) // shape.nodes[-1]]
        rows.append(Row(above[-1], segment, above))
    return rows


def tile(shape: Shape) -> int:
    """The least tile that holds all rows x query group, up to the widest."""
    wanted = shape.nodes[-1] * shape.heads[0] // shape.heads[1]
    return min(WIDEST_TILE, max(16, 1 << (wanted - 1).bit_length()))


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes of one layer's attention. read: of K and V by the tasks; unique: of K and V that there are; alone: what one
    attention call a row would read; partial: states written and read; other: q and o."""

    tasks: int
    read: int
    unique: int
    alone: int
    partial: int
    other: int


def planned(shape: Shape, chunk_tokens: int = CHUNK_TOKENS) -> tuple[list[Row], TaskLists, Planned]:
    """The rows of a shape, and the planner's lists for its tile."""
    num_heads, num_kv_heads = shape.heads
    rows = wave(shape)
    capacity = Capacity.for_rows(len(rows), tasks=32768, pages=2**18, parts=2**18)
    planner = TaskPlanner(
        page_size=PAGE_SIZE, rows_per_task=tile(shape) * num_kv_heads // num_heads, capacity=capacity,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    lists = TaskLists(capacity)
    found = planner.plan(rows, 0, lists)
    if not isinstance(found, Planned):
        raise SystemExit(f"{shape.name}: {found}")
    return rows, lists, found


def count(shape: Shape, rows: list[Row], lists: TaskLists, plan: Planned) -> Counted:
    """What the tasks of a plan read and write."""
    num_heads, num_kv_heads = shape.heads
    tasks = lists.tasks[: plan.tasks].astype(np.int64)
    written = np.asarray([row.segment.length for row in rows])[tasks[:, TASK_SEGMENT]]
    left = np.where(tasks[:, TASK_SEGMENT] >= 0, written - tasks[:, TASK_FIRST], tasks[:, TASK_LENGTH])
    token_bytes = 2 * num_kv_heads * shape.head_dim * ELEMENT_BYTES
    query = int(tasks[:, TASK_NUM_ROWS].sum()) * num_heads * shape.head_dim * ELEMENT_BYTES
    return Counted(
        tasks=plan.tasks,
        read=int(np.minimum(tasks[:, TASK_LENGTH], left).sum()) * token_bytes,
        unique=sum(n * t for n, t in zip(shape.nodes, shape.tokens, strict=True)) * token_bytes,
        alone=len(rows) * sum(shape.tokens) * token_bytes,
        partial=2 * plan.parts * num_heads * (shape.head_dim + 1) * STATE_BYTES,
        other=query + len(rows) * num_heads * shape.head_dim * ELEMENT_BYTES,
    )


def line(shape: Shape, chunk_tokens: int) -> str:
    """One line of the table."""
    c = count(shape, *planned(shape, chunk_tokens))
    num_heads, num_kv_heads = shape.heads
    return (
        f"| {shape.name} | {num_heads}/{num_kv_heads} | {tile(shape)} | {c.tasks} | {c.unique / 2**20:.1f} | "
        f"{c.read / c.unique:.2f} | {c.alone / c.unique:.1f} | {100 * c.partial / c.read:.1f}% | "
        f"{100 * c.other / c.read:.1f}% |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, help="tokens a task reads")
    options = parser.parse_args()
    print("| shape | heads | tile | tasks | unique MiB | read / unique | per branch / unique | partials | q and o |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in [*hydragen(), *fasttree(), *others()]:
        print(line(shape, options.chunk))


if __name__ == "__main__":
    main()
