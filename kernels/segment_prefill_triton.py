"""The Triton kernel behind `segment_prefill`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit, power_of_two
from anabranch.kernels.segment_attention import DTYPES, HEAD_DIMS, PAGE_BITS, PAGE_SIZES
from anabranch.kernels.segment_attention_triton import num_programs
from anabranch.kernels.segment_prefill import BLOCK_FIELDS, SPAN_FIELDS, largest_block
from anabranch.kernels.shipped import Config, Matrix, pointer

if HAS_TRITON:
    import triton.language as tl

# Entries of a page list that are looked at together to find where a window begins and ends. Not measured.
WINDOW_PAGES = 128


@jit
def segment_prefill_kernel(
    q_ptr, q_stride_row, q_stride_head,
    positions_ptr,
    k_ptr, k_stride_page, k_stride_head, k_stride_slot,
    v_ptr, v_stride_page, v_stride_head, v_stride_slot,
    cos_ptr, sin_ptr, num_positions,
    blocks_ptr, num_blocks_ptr, spans_ptr, task_pages_ptr, page_start_ptr,
    out_ptr, lse_ptr,
    scale, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_FIELDS: tl.constexpr, SPAN_FIELDS: tl.constexpr, PAGE_BITS: tl.constexpr, WINDOW_PAGES: tl.constexpr,
):  # fmt: skip
    """Attention of each (tile of rows x query group, KV head), as `segment_prefill_torch` defines it.

    BLOCK_HALF: head_dim / 2, rounded up to a power of two. Q, K, V and the output are held as their halves. Of Q and
    K these are the two members of each rotary pair, as in `segment_attention_kernel`; of V they keep a product of 64
    rows as tall as wide, for else each warp of an sm_80 would hold all rows of Q and of the weights.
    WINDOWED: keys at least `window` behind are hidden
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    log2e: tl.constexpr = 1.4426950408889634
    ln2: tl.constexpr = 0.6931471805599453

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_HALF)
    half_ok = half < HALF
    kind = k_ptr.dtype.element_ty

    # The items of all blocks are dealt out in turn: `turn` is this program's first one in the block at hand.
    turn = tl.program_id(0)
    for block in range(tl.load(num_blocks_ptr)):
        first_row = tl.load(blocks_ptr + block * BLOCK_FIELDS)
        num_rows = tl.load(blocks_ptr + block * BLOCK_FIELDS + 1)
        first_span = tl.load(blocks_ptr + block * BLOCK_FIELDS + 2)
        num_spans = tl.load(blocks_ptr + block * BLOCK_FIELDS + 3)
        num_tiles = tl.cdiv(num_rows, TILE_ROWS)
        num_items = num_tiles * NUM_KV_HEADS
        for item in range(turn, num_items, tl.num_programs(0)):
            # Programs that run together read the same head's keys. The last rows see the most keys: they go first.
            head = item // num_tiles
            begin_row = (num_tiles - 1 - item % num_tiles) * TILE_ROWS
            end_row = tl.minimum(begin_row + TILE_ROWS, num_rows)
            member = begin_row + m // GROUP
            # Rows past the tile's are there where the group is no power of two.
            row_ok = member < end_row
            row = first_row + member
            query_head = head * GROUP + m % GROUP
            # 64 bits: with the KV head outermost, a head's stride is that of the whole pool.
            k_head = k_ptr + head.to(tl.int64) * k_stride_head
            v_head = v_ptr + head.to(tl.int64) * v_stride_head
            position = tl.load(positions_ptr + row, mask=row_ok, other=0)
            q_ok = row_ok[:, None] & half_ok[None, :]
            q_at = (
                q_ptr + row.to(tl.int64)[:, None] * q_stride_row + query_head[:, None] * q_stride_head + half[None, :]
            )

            largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc_low = tl.zeros([BLOCK_M, BLOCK_HALF], tl.float32)
            acc_high = tl.zeros([BLOCK_M, BLOCK_HALF], tl.float32)
            for number in range(first_span, first_span + num_spans):
                span = spans_ptr + number * SPAN_FIELDS
                pages = task_pages_ptr + tl.load(span)
                starts = page_start_ptr + tl.load(span)
                length = tl.load(span + 1)
                shift = tl.load(span + 2)
                causal = tl.load(span + 3)
                # Without a causal span the last slot is visible to all rows.
                newest = tl.where(row_ok, tl.where(causal >= 0, causal + member, length), -1)
                begin = 0
                end = tl.where(causal >= 0, tl.minimum(length, causal + end_row), length)
                angle = position - shift
                if WINDOWED:
                    # Whole tiles that are hidden from every row are left out at either end.
                    oldest = tl.min(tl.where(row_ok, angle, 2147483647), 0) - window
                    first_page = tl.cdiv(end, PAGE_SIZE)
                    last_page = 0
                    for group in range(0, tl.cdiv(end, PAGE_SIZE), WINDOW_PAGES):
                        at = group + tl.arange(0, WINDOW_PAGES)
                        at_ok = at * PAGE_SIZE < end
                        entry = tl.load(pages + at, mask=at_ok, other=0)
                        start = tl.load(starts + at, mask=at_ok, other=0)
                        near = at_ok & (start + (entry & ((1 << PAGE_BITS) - 1)) - 1 > oldest)
                        first_page = tl.minimum(first_page, tl.min(tl.where(near, at, 2147483647), 0))
                        last_page = tl.maximum(last_page, tl.max(tl.where(near, at + 1, 0), 0))
                    begin = first_page * PAGE_SIZE // BLOCK_N * BLOCK_N
                    end = tl.minimum(end, last_page * PAGE_SIZE)

                # q is read and rotated again for each span rather than held beside its rotated halves: spans of one
                # shift are mostly one span, and registers are what runs out. For their sake a barrier keeps the sines
                # from being loaded before the products with the cosines are there.
                # cos is even and sin is odd, so the table need not hold negative positions.
                table = tl.where(angle < 0, -angle, angle)
                table_ok = (row_ok & (table < num_positions))[:, None] & half_ok[None, :]
                factor = table[:, None] * HALF + half[None, :]
                sign = tl.where(angle < 0, -1.0, 1.0)[:, None]
                low = tl.load(q_at, mask=q_ok, other=0.0)
                high = tl.load(q_at + HALF, mask=q_ok, other=0.0)
                # A position past the table gives NaN: loud, and in bounds.
                cos = tl.load(cos_ptr + factor, mask=table_ok, other=float("nan"))
                low_cos = low.to(tl.float32) * cos
                high_cos = high.to(tl.float32) * cos
                tl.debug_barrier()
                sin = tl.load(sin_ptr + factor, mask=table_ok, other=float("nan")) * sign
                q_low = tl.where(q_ok, low_cos - high.to(tl.float32) * sin, 0.0).to(kind)
                q_high = tl.where(q_ok, high_cos + low.to(tl.float32) * sin, 0.0).to(kind)

                for key in range(begin, end, BLOCK_N):
                    index = key + n
                    slot = index % PAGE_SIZE
                    # A tile within one page needs one address; else each key has its own.
                    if PAGE_SIZE >= BLOCK_N:
                        page_at = key // PAGE_SIZE
                        entry = tl.load(pages + page_at)
                        page = (entry >> PAGE_BITS).to(tl.int64)
                        k_at = k_head + page * k_stride_page + slot[:, None] * k_stride_slot
                        v_at = v_head + page * v_stride_page + slot[:, None] * v_stride_slot
                    else:
                        page_at = index // PAGE_SIZE
                        entry = tl.load(pages + page_at, mask=index < end, other=0)
                        page = (entry >> PAGE_BITS).to(tl.int64)[:, None]
                        k_at = k_head + page * k_stride_page + slot[:, None] * k_stride_slot
                        v_at = v_head + page * v_stride_page + slot[:, None] * v_stride_slot
                    key_ok = (slot < (entry & ((1 << PAGE_BITS) - 1))) & (index < end)
                    k_at += half[None, :]
                    k_ok = key_ok[:, None] & half_ok[None, :]
                    k_low = tl.load(k_at, mask=k_ok, other=0.0)
                    k_high = tl.load(k_at + HALF, mask=k_ok, other=0.0)
                    score = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
                    score = tl.dot(q_high, tl.trans(k_high), score, input_precision="ieee")
                    seen = key_ok[None, :] & (index[None, :] <= newest[:, None])
                    if WINDOWED:
                        if PAGE_SIZE >= BLOCK_N:
                            written = tl.load(starts + page_at) + slot
                        else:
                            written = tl.load(starts + page_at, mask=index < end, other=0) + slot
                        seen = seen & (angle[:, None] - written[None, :] < window)
                    score = tl.where(seen, score * (scale * log2e), float("-inf"))
                    peak = tl.maximum(largest, tl.max(score, 1))
                    # While a row has seen nothing its peak is -inf, and -inf - -inf would be NaN.
                    base = tl.where(peak == float("-inf"), 0.0, peak)
                    keep = tl.exp2(largest - base)
                    weight = tl.exp2(score - base[:, None])
                    total = total * keep + tl.sum(weight, 1)
                    v_at += half[None, :]
                    v_low = tl.load(v_at, mask=k_ok, other=0.0)
                    v_high = tl.load(v_at + HALF, mask=k_ok, other=0.0)
                    weight = weight.to(kind)
                    acc_low = tl.dot(weight, v_low, acc_low * keep[:, None], input_precision="ieee")
                    acc_high = tl.dot(weight, v_high, acc_high * keep[:, None], input_precision="ieee")
                    largest = peak

            empty = total == 0.0
            divisor = tl.where(empty, 1.0, total)
            lse = tl.where(empty, float("-inf"), (largest + tl.log2(divisor)) * ln2)
            state = row.to(tl.int64) * NUM_HEADS + query_head
            tl.store(lse_ptr + state, lse, mask=row_ok)
            out_at = out_ptr + state[:, None] * HEAD_DIM + half[None, :]
            tl.store(out_at, (acc_low / divisor[:, None]).to(kind), mask=q_ok)
            tl.store(out_at + HALF, (acc_high / divisor[:, None]).to(kind), mask=q_ok)
        turn += tl.cdiv(num_items - turn, tl.num_programs(0)) * tl.num_programs(0) - num_items


class Tile(NamedTuple):
    """How one configuration is compiled. block_n: keys a step of the loop."""

    block_n: int
    num_warps: int
    num_stages: int


def tile(head_dim: int, element_size: int, page_size: int, block_m: int, windowed: bool) -> Tile:
    """The tile of a configuration: the most keys a step, and then the most stages, with which none spills in
    ahead-of-time builds for sm_80, sm_90, sm_100 and gfx942; but fp32 heads of 80 and 96 under a window spill on sm_80
    with every tile tried. Not timed.

    head_dim: as stored; element_size: bytes
    """
    wide = power_of_two(head_dim)
    if element_size == 4:
        if block_m == 64:
            return Tile(16, 8, 1 if windowed and wide == 128 else 2)
        # A second stage spills on sm_90 where a page holds the keys of a step.
        if wide == 64:
            return Tile(32, 4, 2 if block_m == 16 else 1)
        if block_m == 16 and wide == 128:
            return Tile(16, 4, 1)
        return Tile(16, 8 if block_m == 32 else 4, 2)
    if block_m < 64:
        if wide <= 128:
            return Tile(64, 4, 2)
        return Tile(32, 4, 2) if block_m == 16 else Tile(32, 8, 1)
    if wide == 64:
        # sm_100 spills from what loads an address a key in two stages, and with 32 keys a step from two stages alone.
        return Tile(64, 4, 2) if page_size >= 64 and not windowed else Tile(32, 4, 1)
    if windowed:
        return Tile(32 if head_dim == wide else 16, 8, 1)
    return Tile(32, 4, 2)


def launch_segment_prefill(
    kernel: Any,
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    out: Tensor, lse: Tensor, *, scale: float, window: int, block_m: int,
) -> None:  # fmt: skip
    """Fill the rows of `out` and `lse`, both contiguous, that the blocks name. Arguments as `segment_prefill`'s, which
    checks them.

    kernel: `segment_prefill_kernel`, or that wrapped for tracing
    """
    _, num_kv_heads, page_size, head_dim = k.shape
    compiled = tile(head_dim, k.element_size(), page_size, block_m, window > 0)
    kernel[(num_programs(q.device),)](
        q, q.stride(0), q.stride(1),
        positions,
        k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2),
        cos, sin, cos.shape[0],
        blocks, num_blocks, spans, task_pages, page_start,
        out, lse,
        scale, window,
        NUM_KV_HEADS=num_kv_heads, GROUP=q.shape[1] // num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_HALF=max(16, power_of_two(head_dim // 2)),
        PAGE_SIZE=page_size, BLOCK_M=block_m, BLOCK_N=compiled.block_n, WINDOWED=window > 0,
        BLOCK_FIELDS=BLOCK_FIELDS, SPAN_FIELDS=SPAN_FIELDS, PAGE_BITS=PAGE_BITS, WINDOW_PAGES=WINDOW_PAGES,
        num_warps=compiled.num_warps, num_stages=compiled.num_stages,
    )  # fmt: skip


def shipped(head_dim: int, dtype: torch.dtype, page_size: int, block_m: int, group: int, windowed: bool) -> Config:
    """One configuration, as `launch_segment_prefill` launches it, to be built ahead of time."""
    pool = pointer(dtype)
    compiled = tile(head_dim, dtype.itemsize, page_size, block_m, windowed)
    # fp32 products are exact (`input_precision="ieee"`), which no matrix instruction of NVIDIA's gives.
    matrix: Matrix = "none" if dtype == torch.float32 else "wgmma" if block_m >= 64 else "mma"
    return Config(
        f"segment_prefill-{pool[1:]}-d{head_dim}-p{page_size}-m{block_m}-g{group}{'-window' * windowed}",
        segment_prefill_kernel,
        {
            "q_ptr": pool, "q_stride_row": "i32", "q_stride_head": "i32", "positions_ptr": "*i32",
            "k_ptr": pool, "k_stride_page": "i32", "k_stride_head": "i32", "k_stride_slot": "i32",
            "v_ptr": pool, "v_stride_page": "i32", "v_stride_head": "i32", "v_stride_slot": "i32",
            "cos_ptr": "*fp32", "sin_ptr": "*fp32", "num_positions": "i32",
            "blocks_ptr": "*i32", "num_blocks_ptr": "*i32", "spans_ptr": "*i32", "task_pages_ptr": "*i32",
            "page_start_ptr": "*i32", "out_ptr": pool, "lse_ptr": "*fp32", "scale": "fp32", "window": "i32",
        },
        {
            "NUM_KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim,
            "BLOCK_HALF": max(16, power_of_two(head_dim // 2)), "PAGE_SIZE": page_size, "BLOCK_M": block_m,
            "BLOCK_N": compiled.block_n, "WINDOWED": windowed, "BLOCK_FIELDS": BLOCK_FIELDS,
            "SPAN_FIELDS": SPAN_FIELDS, "PAGE_BITS": PAGE_BITS, "WINDOW_PAGES": WINDOW_PAGES,
        },
        compiled.num_warps,
        compiled.num_stages,
        matrix,
    )  # fmt: skip


SHIPPED = tuple(
    shipped(head_dim, dtype, page_size, block_m, group, windowed)
    for head_dim in HEAD_DIMS
    for dtype in DTYPES
    for page_size in PAGE_SIZES
    for block_m in (16, 32, 64)
    if block_m <= largest_block(head_dim, dtype)
    for group, windowed in (((4, False), (3, True)) if block_m == largest_block(head_dim, dtype) else ((4, False),))
    if not (windowed and dtype == torch.float32 and head_dim in (80, 96))
)
"""What is built, windows in the widest tile; the query group changes no tile, so a few stand for all. fp32 heads of 80
and 96 under a window run as well, and are left out since they spill on sm_80."""
