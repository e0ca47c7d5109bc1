"""The Triton kernel of prefill attention in Triton's interpreter, against its torch definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_interpreter, starts_interpreter
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from anabranch.kernels.segment_attention import PAGE_BITS
from anabranch.kernels.segment_prefill import BLOCK_FIELDS, SPAN_FIELDS, segment_prefill, segment_prefill_torch

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
SENTINEL = 1234.5


@starts_interpreter
def test_in_the_interpreter() -> None:
    """Every test below that needs the interpreter passes in it."""
    run_in_interpreter(__file__)


class Span(NamedTuple):
    """Sealed segments under one shift. segments: (tokens, first position) of each."""

    segments: list[tuple[int, int]]
    shift: int = 0


class Thread(NamedTuple):
    """One thread that prefills. written: tokens that its open segment held before; position: of its first new row."""

    spans: list[Span]
    num_rows: int
    position: int
    written: int = 0


class Seen(NamedTuple):
    """A slot of the pool that a row sees: its page, its place there, the position of its key, the shift."""

    page: int
    slot: int
    position: int
    shift: int


@dataclass
class Case:
    """One launch in tensors."""

    q: Tensor
    positions: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    blocks: Tensor
    num_blocks: Tensor
    spans: Tensor
    task_pages: Tensor
    page_start: Tensor
    views: list[list[Seen] | None]
    """What each row sees; None for a row of no block."""
    window: int
    block_m: int

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.positions, self.k, self.v, self.cos, self.sin,
            self.blocks, self.num_blocks, self.spans, self.task_pages, self.page_start,
        )  # fmt: skip


def make(
    threads: list[Thread], *, heads: tuple[int, int] = (2, 1), head_dim: int = 64, page_size: int = 16,
    dtype: torch.dtype = torch.float32, window: int = 0, block_m: int = 16, head_first: bool = False, cut: int = 0,
) -> Case:  # fmt: skip
    """Threads laid into a pool, each with an open segment that its rows are the newest tokens of.

    Every slot that no token was written to is NaN. Between the rows of two threads one row is nobody's.
    cut: make blocks of so many rows of a thread, rather than one; the same tensors come of it otherwise
    """
    generator = torch.Generator().manual_seed(len(threads) * 1000 + threads[0].num_rows if threads else 0)
    num_heads, num_kv_heads = heads
    runs = [tokens for thread in threads for span in thread.spans for tokens, _ in span.segments]
    runs += [thread.written + thread.num_rows for thread in threads]
    num_pages = sum(-(-tokens // page_size) for tokens in runs) + 3
    if head_first:
        flat = (torch.full((num_kv_heads, num_pages * page_size, head_dim), float("nan"), dtype=dtype) for _ in "kv")
        k, v = (x.view(num_kv_heads, num_pages, page_size, head_dim).transpose(0, 1) for x in flat)
    else:
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        k, v = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
    free = torch.randperm(num_pages, generator=generator).tolist()
    task_pages: list[int] = []
    page_start: list[int] = []

    def write(tokens: int, start: int, shift: int, is_open: bool) -> list[Seen]:
        pages = [free.pop() for _ in range(-(-tokens // page_size))]
        for number, page in enumerate(pages):
            # Pages of an open segment are planned ahead: that the last is not full yet shows in the span's length.
            filled = page_size if is_open else min(page_size, tokens - number * page_size)
            task_pages.append(page << PAGE_BITS | filled)
            page_start.append(start + number * page_size)
        seen = [Seen(pages[i // page_size], i % page_size, start + i, shift) for i in range(tokens)]
        for page, slot, _, _ in seen:
            for pool in (k, v):
                pool[page, :, slot] = torch.randn(num_kv_heads, head_dim, generator=generator).to(dtype)
        return seen

    blocks: list[list[int]] = []
    spans: list[list[int]] = []
    views: list[list[Seen] | None] = []
    positions: list[int] = []
    for thread in threads:
        sealed: list[Seen] = []
        common: list[list[int]] = []
        for span in thread.spans:
            first_page = len(task_pages)
            length = 0
            for tokens, start in span.segments:
                length = (len(task_pages) - first_page) * page_size + tokens
                sealed += write(tokens, start, span.shift, False)
            common.append([first_page, length, span.shift, -1])
        first_page = len(task_pages)
        own = write(thread.written + thread.num_rows, thread.position - thread.written, 0, True)
        for first in range(0, max(thread.num_rows, 1), cut or max(thread.num_rows, 1)):
            count = min(cut or thread.num_rows, thread.num_rows - first)
            causal = thread.written + first
            blocks.append([len(views) + first, count, len(spans), len(common) + 1])
            spans += [*common, [first_page, causal + count, 0, causal]]
        for row in range(thread.num_rows):
            views.append(sealed + own[: thread.written + row + 1])
            positions.append(thread.position + row)
        views.append(None)
        positions.append(3)
    num_rows = len(views)
    # As it lies in the output of a fused projection of q, k and v.
    q = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)[:, :num_heads]
    angles = torch.arange(160)[:, None] * 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return Case(
        q, torch.tensor(positions, dtype=torch.int32), k, v, angles.cos(), angles.sin(),
        torch.tensor([*blocks, [9] * BLOCK_FIELDS], dtype=torch.int32),
        torch.tensor([len(blocks)], dtype=torch.int32),
        torch.tensor([*spans, [9] * SPAN_FIELDS], dtype=torch.int32),
        torch.tensor([*task_pages, 0], dtype=torch.int32), torch.tensor([*page_start, 0], dtype=torch.int32),
        views, window, block_m,
    )  # fmt: skip


def run_kernel(case: Case) -> tuple[Tensor, Tensor]:
    """The kernel, launched on buffers of sentinels, which must survive past the end and in rows of no block."""
    from anabranch.kernels.segment_prefill_triton import launch_segment_prefill, segment_prefill_kernel

    num_rows, num_heads, head_dim = case.q.shape
    out = torch.full((num_rows + 1, num_heads, head_dim), SENTINEL, dtype=case.q.dtype)
    lse = torch.full((num_rows + 1, num_heads), SENTINEL)
    launch_segment_prefill(
        segment_prefill_kernel, *case.arguments(), out, lse,
        scale=case.scale, window=case.window, block_m=case.block_m,
    )  # fmt: skip
    nobody = torch.tensor([view is None for view in [*case.views, None]])
    assert (out[nobody] == torch.tensor(SENTINEL).to(case.q.dtype)).all() and (lse[nobody] == SENTINEL).all()
    return out[~nobody], lse[~nobody]


def run_torch(case: Case) -> tuple[Tensor, Tensor]:
    """The same rows by the definition."""
    out, lse = segment_prefill_torch(*case.arguments(), case.scale, case.window, case.block_m)
    named = torch.tensor([view is not None for view in case.views], dtype=torch.bool)
    return out[named], lse[named]


def run_dense(case: Case) -> Tensor:
    """The same rows with no spans at all: each by one softmax over the slots of its view."""
    half = case.q.shape[-1] // 2
    group = case.q.shape[1] // case.k.shape[1]
    found = []
    for row, view in enumerate(case.views):
        if view is None:
            continue
        position = int(case.positions[row])
        scores, values = [], []
        for page, slot, written, shift in view:
            if case.window and position - written - shift >= case.window:
                continue
            angle = (position - shift) * 10000.0 ** (-torch.arange(half) / half)
            low, high = case.q[row, :, :half].float(), case.q[row, :, half:].float()
            query = torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)
            key, value = (x[page, :, slot].float().repeat_interleave(group, 0) for x in (case.k, case.v))
            scores.append((query.to(case.q.dtype).float() * key).sum(-1) * case.scale)
            values.append(value)
        weight = torch.stack(scores).softmax(0)
        found.append(torch.einsum("kh,khd->hd", weight, torch.stack(values)))
    return torch.stack(found)


def check(case: Case) -> None:
    """Kernel and definition agree."""
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[case.q.dtype])


# A thread after a stitched join, whose block is bigger than a tile and goes on in its segment; one of a single row; one
# that starts from an empty view.
THREADS = [
    Thread([Span([(37, 0)]), Span([(5, 37), (9, 37)], 5), Span([(1, 37)], 14), Span([(0, 37)], 3)], 21, 53, written=7),
    Thread([Span([(37, 0)])], 1, 37),
    Thread([], 16, 0),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_definition_is_attention_over_the_view(dtype: torch.dtype) -> None:
    """The definition gives what one softmax over each row's whole view gives; NaN is never read."""
    for window in (0, 20):
        case = make(THREADS, heads=(6, 2), dtype=dtype, window=window)
        torch.testing.assert_close(run_torch(case)[0].float(), run_dense(case), rtol=0, atol=TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "block_m", "head_first"),
    [((6, 2), 64, 16, 16, False), ((5, 1), 80, 64, 16, True), ((3, 3), 96, 128, 16, False), ((4, 2), 128, 16, 32, True),
     ((2, 1), 256, 16, 16, False), ((14, 2), 64, 16, 64, False)],
)  # fmt: skip
def test_threads(
    heads: tuple[int, int], head_dim: int, page_size: int, block_m: int, head_first: bool, dtype: torch.dtype
) -> None:
    """Blocks of one row, of more than a tile, after a stitch and from nothing, in groups that fill no tile."""
    check(
        make(
            THREADS, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype, block_m=block_m,
            head_first=head_first,
        )
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize("window", [1, 20])
def test_a_window(window: int) -> None:
    """Under a sliding window far keys are hidden, whole spans included."""
    case = make(THREADS, heads=(3, 1), window=window)
    check(case)
    torch.testing.assert_close(run_kernel(case)[0], run_dense(case), rtol=0, atol=3e-6)


@interpreted
@pytest.mark.parametrize("window", [0, 30])
def test_segments_in_one_span(window: int) -> None:
    """Several short segments in one span are read to where each ends, and their keys stand where they were written."""
    pack = Span([(1, 19), (33, 19), (16, 19), (7, 19)], 4)
    case = make([Thread([Span([(19, 0)]), pack], 5, 59)], heads=(3, 1), window=window)
    check(case)
    torch.testing.assert_close(run_kernel(case)[0], run_dense(case), rtol=0, atol=3e-6)


@interpreted
@pytest.mark.parametrize(
    "threads",
    [
        [Thread([], 1, 0)],
        [Thread([Span([(16, 0)])], 1, 16)],
        [Thread([Span([(0, 0)]), Span([])], 17, 3)],
        [Thread([Span([(17, 0)])], 0, 17)],
        [Thread([], 0, 0), Thread([], 8, 0, written=1), Thread([], 0, 0), Thread([], 9, 0, written=16)],
        [],
    ],
    ids=["one-element", "one-page", "empty-spans", "no-rows", "blocks-of-no-rows", "nothing"],
)
def test_small_sizes(threads: list[Thread]) -> None:
    """One token, one page, spans of no keys, blocks of no rows and no block at all."""
    if threads:
        check(make(threads))
    else:
        case = make([Thread([], 3, 0)])
        case.num_blocks.zero_()
        case.views = [None] * len(case.views)
        run_kernel(case)


@interpreted
def test_a_row_that_sees_nothing() -> None:
    """Without any key, out is 0 and lse is -inf: no span, one of length 0, and one that the window hides."""
    case = make([Thread([Span([(9, 0)])], 2, 100)], window=30)
    for num_spans, length in ((0, 9), (1, 0), (1, 9)):
        case.blocks[0, 3] = num_spans
        case.spans[0, 1] = length
        out, lse = run_kernel(case)
        assert (out == 0).all() and torch.isneginf(lse).all()
        check(case)


@interpreted
def test_every_slot_of_a_view_shows_and_no_other() -> None:
    """A slot's weight is not 0 exactly where a row sees it, and a change of its key changes it."""
    # Each slot's value is a direction of its own, so the output holds the weight of each.
    case = make(THREADS, heads=(1, 1), head_dim=256)
    views = [view for view in case.views if view is not None]
    slots = sorted({(seen.page, seen.slot) for view in views for seen in view})
    for direction, (page, slot) in enumerate(slots):
        case.v[page, :, slot] = torch.eye(256)[direction]
    expected = torch.zeros(len(views), 256, dtype=torch.bool)
    for row, view in enumerate(views):
        expected[row, [slots.index((seen.page, seen.slot)) for seen in view]] = True
    before = run_kernel(case)[0][:, 0]
    assert torch.equal(before != 0, expected)
    generator = torch.Generator().manual_seed(3)
    for page, slot in slots:
        case.k[page, :, slot] += torch.randn(256, generator=generator)
    after = run_kernel(case)[0][:, 0]
    torch.testing.assert_close(after, run_dense(case)[:, 0], rtol=0, atol=3e-6)
    for row, seen in enumerate(expected):
        factors = after[row, seen] / before[row, seen]
        # A row of one key gives it all its weight.
        assert seen.sum() == 1 or len(factors.unique()) == len(factors)


@interpreted
def test_keys_that_the_order_hides_from_a_tile_are_not_read() -> None:
    """NaN in the keys of later tiles' rows leaves a tile as it was."""
    case = make([Thread([Span([(20, 0)])], 40, 20, written=5)], heads=(1, 1))
    expected = run_kernel(case)[0]
    view = case.views[39]
    assert view is not None
    for seen in view[20 + 5 + 16 :]:
        case.k[seen.page, :, seen.slot] = case.v[seen.page, :, seen.slot] = float("nan")
    found = run_kernel(case)[0]
    assert torch.equal(found[:16], expected[:16]) and torch.isnan(found[16:]).all()


@interpreted
@pytest.mark.parametrize("page_size", [16, 128])
def test_tiles_that_the_window_hides_are_not_read(page_size: int) -> None:
    """NaN in keys that stand before every row's window, by more than a page and a tile, changes nothing."""
    case = make([Thread([Span([(130, 0)])], 20, 130)], heads=(1, 1), window=30 if page_size == 16 else 2,
                page_size=page_size)  # fmt: skip
    expected = run_kernel(case)[0]
    view = case.views[0]
    assert view is not None
    for seen in view[: 64 if page_size == 16 else 128]:
        case.k[seen.page, :, seen.slot] = case.v[seen.page, :, seen.slot] = float("nan")
    assert torch.equal(run_kernel(case)[0], expected)


def product(a: NDArray[np.float32], b: NDArray[np.float32], dtype: DTypeLike) -> NDArray[np.float32]:
    """Matrix product whose sums go in order: those of a BLAS depend on a row's place."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for inner in range(a.shape[1]):
        total += a[:, inner, None] * b[inner]
    return total


@interpreted
@pytest.mark.parametrize("window", [0, 20])
def test_blocks_change_no_bit(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a thread's rows are cut into blocks, each row has the same bits."""
    monkeypatch.setattr("numpy.matmul", product)
    whole = run_kernel(make(THREADS, heads=(3, 1), window=window))
    for cut in (1, 2, 7, 16):
        for found, expected in zip(run_kernel(make(THREADS, heads=(3, 1), window=window, cut=cut)), whole, strict=True):
            assert torch.equal(found, expected)


@interpreted
def test_a_negative_angle() -> None:
    """A shift beyond a row's position rotates the query backwards."""
    case = make([Thread([Span([(9, 0)], 100)], 2, 30)])
    torch.testing.assert_close(run_kernel(case)[0], run_dense(case), rtol=0, atol=3e-6)


@interpreted
def test_a_position_past_the_table_is_nan() -> None:
    """A row that the table has no factors for gets NaN, not some other row's factors; the others are untouched."""
    case = make([Thread([Span([(9, 0)])], 3, 9)])
    expected = run_kernel(case)[0]
    case.positions[1] = len(case.cos)
    found = run_kernel(case)[0]
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and torch.isnan(found[1]).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
def test_the_op_is_well_made() -> None:
    """opcheck finds nothing wrong with schema, fake and tracing, and the op gives what the definition gives."""
    case = make(THREADS)
    torch.library.opcheck(
        torch.ops.anabranch.segment_prefill.default, (*case.arguments(), case.scale, case.window, case.block_m)
    )
    found = segment_prefill(*case.arguments(), scale=case.scale, window=case.window, block_m=case.block_m)
    expected = segment_prefill_torch(*case.arguments(), case.scale, case.window, case.block_m)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_what_is_not_supported_is_named() -> None:
    """A wrong head size, page size, type, group or list is refused by name before anything runs."""
    case = make(THREADS)
    q, positions, k, v, cos, sin, blocks, num_blocks, spans, task_pages, page_start = case.arguments()
    pools = (k, v, cos, sin)
    pages = (task_pages, page_start)

    def call(*arguments: Tensor, block_m: int = 16) -> None:
        segment_prefill(*arguments, scale=1.0, block_m=block_m)  # type: ignore[misc]

    call(q, positions, *pools, blocks, num_blocks, spans, *pages)
    with pytest.raises(ValueError, match="head size of 63"):
        call(q[..., :63], positions, *pools, blocks, num_blocks, spans, *pages)
    with pytest.raises(ValueError, match="page of 8"):
        call(q, positions, k[:, :, :8], v[:, :, :8], cos, sin, blocks, num_blocks, spans, *pages)
    with pytest.raises(ValueError, match="share one type"):
        call(q.half(), positions, *pools, blocks, num_blocks, spans, *pages)
    with pytest.raises(ValueError, match="block_m=8"):
        call(q, positions, *pools, blocks, num_blocks, spans, *pages, block_m=8)
    with pytest.raises(ValueError, match="block_m=128 is at most 64"):
        call(q, positions, *pools, blocks, num_blocks, spans, *pages, block_m=128)
    with pytest.raises(ValueError, match="blocks are"):
        call(q, positions, *pools, blocks[:, :3].contiguous(), num_blocks, spans, *pages)
    with pytest.raises(ValueError, match="spans are"):
        call(q, positions, *pools, blocks, num_blocks, spans[0], *pages)
    with pytest.raises(ValueError, match="num_blocks is"):
        call(q, positions, *pools, blocks, num_blocks[:0], spans, *pages)
    with pytest.raises(ValueError, match="have starts of"):
        call(q, positions, *pools, blocks, num_blocks, spans, task_pages, page_start[1:])
    with pytest.raises(ValueError, match="int32"):
        call(q, positions, *pools, blocks.long(), num_blocks, spans, *pages)
