"""The Triton kernels of decode attention in Triton's interpreter, against their torch definitions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_interpreter, starts_interpreter
from torch import Tensor

from anabranch.kernels.merge_states import merge_parts, merge_parts_torch
from anabranch.kernels.segment_attention import (
    PAGE_BITS,
    TASK_FIELDS,
    attention_torch,
    segment_attention,
    segment_attention_torch,
)

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
SENTINEL = 1234.5


@starts_interpreter
def test_in_the_interpreter() -> None:
    """Every test below that needs the interpreter passes in it."""
    run_in_interpreter(__file__)


@dataclass
class Case:
    """One wave in tensors."""

    q: Tensor
    positions: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    tasks: Tensor
    num_tasks: Tensor
    task_rows: Tensor
    task_pages: Tensor
    page_start: Tensor
    segment_length: Tensor
    num_parts: int
    row_parts_indptr: Tensor
    row_parts: Tensor
    views: list[list[tuple[list[int], int, int]]]
    """For each row (slots of the pool, first position, shift) of each segment that it sees."""
    window: int = 0
    block_m: int = 16

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.positions, self.k, self.v, self.cos, self.sin,
            self.tasks, self.num_tasks, self.task_rows, self.task_pages, self.page_start,
            self.segment_length,
        )  # fmt: skip


Segment = tuple[int, int, int, int, list[int], bool]


def make(
    segments: list[Segment], *, num_rows: int, heads: tuple[int, int] = (2, 1), head_dim: int = 64, page_size: int = 16,
    chunk: int = 32, dtype: torch.dtype = torch.float32, window: int = 0, block_m: int = 16, head_first: bool = False,
    packs: bool = False,
) -> Case:  # fmt: skip
    """Segments (tokens written, tokens planned, first position, shift, rows that see it, is it open) laid into a pool.

    Every slot that no token was written to is NaN.
    packs: neighbours that the same rows see under one shift are one task
    """
    generator = torch.Generator().manual_seed(len(segments) * 1000 + num_rows)
    num_heads, num_kv_heads = heads
    num_pages = sum(-(-planned // page_size) for _, planned, *_ in segments) + 3
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    if head_first:
        flat = (torch.full((num_kv_heads, num_pages * page_size, head_dim), float("nan"), dtype=dtype) for _ in "kv")
        k, v = (x.view(num_kv_heads, num_pages, page_size, head_dim).transpose(0, 1) for x in flat)
    else:
        k, v = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
    free = torch.randperm(num_pages, generator=generator).tolist()
    positions = torch.randint(60, 67, (num_rows,), generator=generator, dtype=torch.int32)
    tasks: list[list[int]] = []
    task_rows: list[int] = []
    task_pages: list[int] = []
    page_start: list[int] = []
    last_rows: list[int] = []
    lengths = torch.zeros(num_rows, dtype=torch.int32)
    parts: list[list[int]] = [[] for _ in range(num_rows)]
    views: list[list[tuple[list[int], int, int]]] = [[] for _ in range(num_rows)]
    per_task = block_m // (num_heads // num_kv_heads)
    num_parts = 0
    for written, planned, start, shift, rows, is_open in segments:
        pages = [free.pop() for _ in range(-(-planned // page_size))]
        slots = [pages[i // page_size] * page_size + i % page_size for i in range(written)]
        for slot in slots:
            for pool in (k, v):
                content = torch.randn(num_kv_heads, head_dim, generator=generator).to(dtype)
                pool[slot // page_size, :, slot % page_size] = content
        if is_open:
            [row] = rows
            lengths[row] = written
        for row in rows:
            views[row].append((slots, start, shift))
        for first in range(0, planned, chunk):
            if packs and not first and tasks and tasks[-1][7] == shift and rows == last_rows:
                # More pages for the task before: each of its pages says how much of it are keys.
                before = (len(task_pages) - tasks[-1][0]) * page_size
                tasks[-1][1] = before + planned
                if is_open:
                    tasks[-1][2:4] = [rows[0], -before]
            else:
                for group in range(0, len(rows), per_task):
                    members = rows[group : group + per_task]
                    tasks.append(
                        [len(task_pages), min(chunk, planned - first), rows[0] if is_open else -1, first,
                         len(task_rows), len(members), num_parts, shift]
                    )  # fmt: skip
                    task_rows += members
                    for row in members:
                        parts[row].append(num_parts)
                        num_parts += 1
            for page in range(first // page_size, -(-min(first + chunk, planned) // page_size)):
                task_pages.append(pages[page] << PAGE_BITS | min(page_size, planned - page * page_size))
                page_start.append(start + page * page_size)
        last_rows = rows
    angles = torch.arange(128)[:, None] * 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    tasks.sort(key=lambda task: -task[1])
    extra = [[9] * TASK_FIELDS] * 2
    return Case(
        torch.randn(num_rows, num_heads, head_dim, generator=generator).to(dtype), positions, k, v,
        angles.cos(), angles.sin(),
        torch.tensor(tasks + extra, dtype=torch.int32), torch.tensor([len(tasks)], dtype=torch.int32),
        torch.tensor([*task_rows, 0], dtype=torch.int32), torch.tensor([*task_pages, 0], dtype=torch.int32),
        torch.tensor([*page_start, 0], dtype=torch.int32), lengths,
        num_parts, torch.tensor([0, *torch.tensor([len(p) for p in parts]).cumsum(0).tolist()], dtype=torch.int32),
        torch.tensor([part for one in parts for part in one], dtype=torch.int32), views, window, block_m,
    )  # fmt: skip


def run_kernel(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Partial and merged states by the kernels, launched on buffers that end in a sentinel, which must survive."""
    from anabranch.kernels.merge_states_triton import launch_merge_parts, merge_parts_kernel
    from anabranch.kernels.segment_attention_triton import launch_segment_attention, segment_attention_kernel

    num_rows, num_heads, head_dim = case.q.shape
    out = torch.full((case.num_parts + 1, num_heads, head_dim), SENTINEL)
    lse = torch.full((case.num_parts + 1, num_heads), SENTINEL)
    launch_segment_attention(
        segment_attention_kernel, *case.arguments(), out, lse,
        scale=case.scale, window=case.window, block_m=case.block_m,
    )  # fmt: skip
    assert (out[-1] == SENTINEL).all() and (lse[-1] == SENTINEL).all()
    merged = torch.full((num_rows + 1, num_heads, head_dim), SENTINEL, dtype=case.q.dtype)
    merged_lse = torch.full((num_rows + 1, num_heads), SENTINEL)
    launch_merge_parts(
        merge_parts_kernel, out, lse, case.row_parts_indptr, case.row_parts, merged[:-1], merged_lse[:-1]
    )
    assert (merged[-1] == torch.tensor(SENTINEL).to(case.q.dtype)).all() and (merged_lse[-1] == SENTINEL).all()
    return out[:-1], lse[:-1], merged[:-1], merged_lse[:-1]


def run_torch(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by the definitions."""
    out, lse = segment_attention_torch(*case.arguments(), case.num_parts, case.scale, case.window, case.block_m)
    return out, lse, *merge_parts_torch(out, lse, case.row_parts_indptr, case.row_parts, case.q.dtype)


def run_dense(case: Case) -> Tensor:
    """Merged outputs with no tasks at all: each row over its own view, by the plain definition."""
    half = case.q.shape[-1] // 2
    found = []
    for row, view in enumerate(case.views):
        position = int(case.positions[row])
        states = []
        for slots, start, shift in view:
            at = torch.tensor(slots, dtype=torch.long)
            size = case.k.shape[2]
            keys, values = (x[at // size, :, at % size].transpose(0, 1).float() for x in (case.k, case.v))
            angle = (position - shift) * 10000.0 ** (-torch.arange(half) / half)
            low, high = case.q[row, :, :half].float(), case.q[row, :, half:].float()
            queries = torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)
            scores = torch.einsum(
                "hd,hkd->hk", queries.to(case.q.dtype).float(),
                keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0),
            ) * case.scale  # fmt: skip
            if case.window:
                far = position - (start + torch.arange(len(slots))) - shift >= case.window
                scores[:, far] = float("-inf")
            states.append((scores, values))
        scores = torch.cat([s for s, _ in states], 1)
        values = torch.cat([v for _, v in states], 1).repeat_interleave(scores.shape[0] // case.k.shape[1], 0)
        found.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), values))
    return torch.stack(found)


# One root, two siblings stitched end to end that rows 0 and 1 see, a third branch that the others have left, and open
# segments: one that is full, one of one token, one planned past a chunk that is still empty.
TREE: list[Segment] = [
    (37, 37, 0, 0, [0, 1, 2, 3, 4], False),
    (5, 5, 37, 0, [0, 1], False),
    (9, 9, 37, 5, [0, 1], False),
    (16, 16, 37, 0, [2], False),
    (1, 1, 37, 0, [3, 4], False),
    (32, 32, 51, 0, [0], True),
    (1, 20, 51, 0, [1], True),
    (7, 50, 53, 0, [2], True),
    (33, 64, 38, 0, [3], True),
    (2, 16, 38, 0, [4], True),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_definition_is_attention_over_the_view(dtype: torch.dtype) -> None:
    """Tasks and merge by the definitions give what one softmax over each row's whole view gives; NaN is never read."""
    for window in (0, 30):
        case = make(TREE, num_rows=5, heads=(6, 2), dtype=dtype, window=window)
        merged = run_torch(case)[2]
        torch.testing.assert_close(merged.float(), run_dense(case), rtol=0, atol=TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "block_m", "head_first"),
    [((6, 2), 64, 16, 16, False), ((5, 1), 80, 64, 16, True), ((3, 3), 96, 128, 16, False), ((4, 2), 128, 16, 32, True),
     ((2, 1), 256, 16, 16, False)],
)  # fmt: skip
def test_a_tree(
    heads: tuple[int, int], head_dim: int, page_size: int, block_m: int, head_first: bool, dtype: torch.dtype
) -> None:
    """A tree with a stitched join: partial and merged states are the definition's, on odd and empty sizes."""
    case = make(
        TREE, num_rows=5, heads=heads, head_dim=head_dim, page_size=page_size, chunk=max(32, page_size), dtype=dtype,
        block_m=block_m, head_first=head_first,
    )  # fmt: skip
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


@interpreted
def test_a_window() -> None:
    """Under a sliding window far keys are hidden, a chunk that is hidden whole included."""
    case = make(TREE, num_rows=5, heads=(2, 2), window=30)
    found, expected = run_kernel(case), run_torch(case)
    assert torch.isneginf(expected[1]).any()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6)


PACK: list[Segment] = [
    (19, 19, 0, 0, [0, 1], False),
    (1, 1, 19, 4, [0, 1], False),
    (33, 33, 19, 4, [0, 1], False),
    (16, 16, 19, 4, [0, 1], False),
    (7, 7, 19, 4, [0, 1], False),
    (3, 16, 59, 0, [1], True),
]


@interpreted
@pytest.mark.parametrize("window", [0, 30])
def test_segments_in_one_task(window: int) -> None:
    """Several short segments in one task are read to where each ends, and their keys stand where they were written."""
    case = make(PACK, num_rows=2, heads=(3, 1), chunk=128, packs=True, window=window)
    assert int(case.num_tasks) == 3
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(run_kernel(case)[2], run_dense(case), rtol=0, atol=3e-6)


@interpreted
@pytest.mark.parametrize("written", [0, 1, 16, 21])
def test_sealed_keys_and_an_open_segment_in_one_task(written: int) -> None:
    """A row's own sealed segments stand before its open one: all of theirs is read, and of that what is written."""
    sealed: list[Segment] = [(19, 19, 0, 0, [1], False), (1, 1, 19, 0, [1], False)]
    case = make([*sealed, (written, 32, 20, 0, [1], True)], num_rows=2, heads=(3, 1), chunk=128, packs=True)
    assert int(case.num_tasks) == 1 and case.tasks[0, 3] == -48
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    case.views[0] = case.views[1]
    torch.testing.assert_close(run_kernel(case)[2][1], run_dense(case)[1], rtol=0, atol=3e-6)


@interpreted
@pytest.mark.parametrize(
    "segments",
    [
        [(1, 1, 0, 0, [0], False)],
        [(16, 16, 0, 0, [0], False)],
        [(17, 17, 3, 0, list(range(9)), False)],
        [(0, 16, 4, 0, [0], True)],
        [],
    ],
    ids=["one-element", "one-page", "two-row-groups", "nothing-written", "nothing"],
)
def test_small_sizes(segments: list[Segment]) -> None:
    """One token, one page, more rows than a task holds, nothing yet written and no task at all."""
    case = make(segments, num_rows=9, heads=(2, 1))
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    if not segments:
        assert torch.isneginf(run_kernel(case)[3]).all()


@interpreted
def test_every_slot_of_a_view_shows_and_no_other() -> None:
    """A slot's weight is not 0 exactly where a row sees it, and a change of its key changes it."""
    # Each slot's value is a direction of its own, so the output holds the weight of each.
    case = make(TREE, num_rows=5, heads=(1, 1), head_dim=256)
    size = case.k.shape[2]
    slots = sorted({slot for view in case.views for run, _, _ in view for slot in run})
    for direction, slot in enumerate(slots):
        case.v[slot // size, :, slot % size] = torch.eye(256)[direction]
    seen = torch.zeros(5, 256, dtype=torch.bool)
    for row, view in enumerate(case.views):
        for run, _, _ in view:
            seen[row, [slots.index(slot) for slot in run]] = True
    before = run_kernel(case)[2][:, 0]
    assert torch.equal(before != 0, seen)
    generator = torch.Generator().manual_seed(3)
    for slot in slots:
        case.k[slot // size, :, slot % size] += torch.randn(256, generator=generator)
    after = run_kernel(case)[2][:, 0]
    torch.testing.assert_close(after, run_dense(case)[:, 0], rtol=0, atol=3e-6)
    for row in range(5):
        factors = after[row, seen[row]] / before[row, seen[row]]
        assert len(factors.unique()) == len(factors)


@interpreted
def test_a_negative_angle() -> None:
    """A shift beyond a row's position rotates the query backwards."""
    case = make([(9, 9, 0, 100, [0, 1], False)], num_rows=2)
    torch.testing.assert_close(run_kernel(case)[2], run_dense(case), rtol=0, atol=3e-6)


@interpreted
def test_a_position_past_the_table_is_nan() -> None:
    """A row that the table has no factors for gets NaN, not some other row's factors; the others are untouched."""
    case = make([(9, 9, 0, 0, [0, 1], False)], num_rows=2)
    expected = run_kernel(case)[2]
    case.positions[1] = len(case.cos)
    found = run_kernel(case)[2]
    assert torch.equal(found[0], expected[0]) and torch.isnan(found[1]).all()


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merge_of_many_parts(dtype: torch.dtype) -> None:
    """More parts than one load takes, units whose output is NaN, a row of units alone, and a row with none."""
    from anabranch.kernels.merge_states_triton import launch_merge_parts, merge_parts_kernel

    generator = torch.Generator().manual_seed(1)
    out = torch.randn(40, 3, 80, generator=generator)
    lse = torch.randn(40, 3, generator=generator) * 4
    lse[[0, 5, 30]] = float("-inf")
    out[[0, 5, 30]] = float("nan")
    parts = torch.randperm(40, generator=generator).to(torch.int32)
    parts = torch.cat((parts[:33], torch.tensor([0, 5]), parts[33:])).to(torch.int32)
    indptr = torch.tensor([0, 33, 35, 35, 42], dtype=torch.int32)
    merged, merged_lse = torch.empty(4, 3, 80, dtype=dtype), torch.empty(4, 3)
    launch_merge_parts(merge_parts_kernel, out, lse, indptr, parts, merged, merged_lse)
    expected = merge_parts_torch(out, lse, indptr, parts, dtype)
    torch.testing.assert_close(merged, expected[0], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(merged_lse, expected[1], rtol=0, atol=3e-6)
    assert (merged[1:3] == 0).all() and torch.isneginf(merged_lse[1:3]).all()


def test_merged_parts_are_the_definition_of_attention() -> None:
    """Ragged parts of three lengths merge to attention over their union; a unit's output is not looked at."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 4, 64, generator=generator)
    k, v = (torch.randn(2, 30, 64, generator=generator) for _ in "kv")
    cuts = [(0, 7), (7, 8), (8, 30)]
    states = [
        attention_torch(q, k[:, a:b], v[:, a:b], torch.ones(1, b - a, dtype=torch.bool), scale=0.1) for a, b in cuts
    ]
    states.append((torch.full_like(states[0][0], float("nan")), torch.full_like(states[0][1], float("-inf"))))
    out, lse = (torch.cat([s[i] for s in states]) for i in (0, 1))
    indptr, parts = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([2, 3, 0, 1], dtype=torch.int32)
    whole = attention_torch(q, k, v, torch.ones(1, 30, dtype=torch.bool), scale=0.1)
    for found, expected in zip(merge_parts(out, lse, indptr, parts, torch.float32), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
def test_the_ops_are_well_made() -> None:
    """opcheck finds nothing wrong with schema, fake and tracing, and the ops give what the definitions give."""
    case = make(TREE, num_rows=5, heads=(2, 1))
    arguments = (*case.arguments(), case.num_parts, case.scale, case.window, case.block_m)
    torch.library.opcheck(torch.ops.anabranch.segment_attention.default, arguments)
    out, lse = segment_attention(*case.arguments(), num_parts=case.num_parts, scale=case.scale, block_m=case.block_m)
    expected = run_torch(case)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    merge = (out, lse, case.row_parts_indptr, case.row_parts, torch.bfloat16)
    torch.library.opcheck(torch.ops.anabranch.merge_states.default, merge)
    assert merge_parts(*merge)[0].dtype == torch.bfloat16


def test_what_is_not_supported_is_named() -> None:
    """A wrong head size, page size, type, group, layout or list is refused by name before anything runs."""
    case = make(TREE, num_rows=5, heads=(2, 1))
    q, positions, k, v, *rest = case.arguments()

    def call(*arguments: Tensor, block_m: int = 16) -> None:
        segment_attention(*arguments, num_parts=case.num_parts, scale=1.0, block_m=block_m)  # type: ignore[misc]

    call(q, positions, k, v, *rest)
    with pytest.raises(ValueError, match="head size of 63"):
        call(q[..., :63], positions, k, v, *rest)
    with pytest.raises(ValueError, match="page of 8"):
        call(q, positions, k[:, :, :8], v[:, :, :8], *rest)
    with pytest.raises(ValueError, match="share one type"):
        call(q.double(), positions, k, v, *rest)
    with pytest.raises(ValueError, match="keys of"):
        call(q, positions, k, v[..., :32], *rest)
    with pytest.raises(ValueError, match="no multiple of"):
        call(q, positions, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), *rest)
    with pytest.raises(ValueError, match="block_m=8"):
        call(q, positions, k, v, *rest, block_m=8)
    with pytest.raises(ValueError, match="contiguous in head_dim"):
        call(q, positions, k.transpose(2, 3).contiguous().transpose(2, 3), v, *rest)
    with pytest.raises(ValueError, match="positions of"):
        call(q, positions[:2], k, v, *rest)
    with pytest.raises(ValueError, match="int32"):
        call(q, positions.long(), k, v, *rest)
    with pytest.raises(ValueError, match="cos and sin"):
        call(q, positions, k, v, rest[0][:, :8], *rest[1:])
    with pytest.raises(ValueError, match="tasks are"):
        call(q, positions, k, v, *rest[:2], rest[2][:, :4].contiguous(), *rest[3:])
    with pytest.raises(ValueError, match="fp32"):
        merge_parts(q.half(), q[..., 0], case.row_parts_indptr, case.row_parts, torch.float32)
    with pytest.raises(ValueError, match="do not go with"):
        merge_parts(q, q, case.row_parts_indptr, case.row_parts, torch.float32)
    with pytest.raises(ValueError, match="int32"):
        merge_parts(q, q[..., 0], case.row_parts_indptr.long(), case.row_parts, torch.float32)
    with pytest.raises(ValueError, match="num_rows"):
        merge_parts(q, q[..., 0], case.row_parts_indptr[:0], case.row_parts, torch.float32)
