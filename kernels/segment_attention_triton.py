"""The Triton kernel behind `segment_attention`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit, power_of_two
from anabranch.kernels.segment_attention import DTYPES, HEAD_DIMS, PAGE_BITS, PAGE_SIZES, TASK_FIELDS, supports
from anabranch.kernels.shipped import Config, Matrix, pointer

if HAS_TRITON:
    import triton.language as tl

# Two programs a multiprocessor: one computes while the other's loads are under way. Not measured.
PROGRAMS_PER_PROCESSOR = 2
# Where there is no device to ask (the interpreter): small, so that every program takes several tasks.
PROGRAMS_ELSEWHERE = 3


@jit
def segment_attention_kernel(
    q_ptr, q_stride_row, q_stride_head,
    positions_ptr,
    k_ptr, k_stride_page, k_stride_head, k_stride_slot,
    v_ptr, v_stride_page, v_stride_head, v_stride_slot,
    cos_ptr, sin_ptr, num_positions,
    tasks_ptr, num_tasks_ptr, task_rows_ptr, task_pages_ptr, page_start_ptr, segment_length_ptr,
    out_ptr, lse_ptr,
    scale, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TASK_FIELDS: tl.constexpr,
    WINDOWED: tl.constexpr, PAGE_BITS: tl.constexpr,
):  # fmt: skip
    """Partial attention of each (task, KV head), as `segment_attention_torch` defines it.

    BLOCK_HALF: head_dim / 2, rounded up to a power of two. Q and K are held as their two halves, which are the two
    members of each rotary pair, so that rotation is elementwise; the score is the sum of two dots.
    WINDOWED: keys at least `window` behind are hidden
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    log2e: tl.constexpr = 1.4426950408889634
    ln2: tl.constexpr = 0.6931471805599453

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_HALF)
    wide = tl.arange(0, 2 * BLOCK_HALF)
    half_ok = half < HALF
    wide_ok = wide < HEAD_DIM

    num_items = tl.load(num_tasks_ptr) * NUM_KV_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        # 64 bits: with the KV head outermost, a head's stride is that of the whole pool.
        head = tl.cast(item % NUM_KV_HEADS, tl.int64)
        task = tasks_ptr + (item // NUM_KV_HEADS) * TASK_FIELDS
        pages = task_pages_ptr + tl.load(task)
        starts = page_start_ptr + tl.load(task)
        length = tl.load(task + 1)
        segment = tl.load(task + 2)
        first = tl.load(task + 3)
        rows = task_rows_ptr + tl.load(task + 4)
        num_rows = tl.load(task + 5)
        part = tl.load(task + 6)
        shift = tl.load(task + 7)
        # An open segment is planned ahead: what is not written yet is masked by its length now.
        filled = tl.load(segment_length_ptr + segment, mask=segment >= 0, other=0) - first
        length = tl.where(segment >= 0, tl.minimum(length, filled), length)

        member = m // GROUP
        row_ok = member < num_rows
        row = tl.load(rows + member, mask=row_ok, other=0)
        query_head = head * GROUP + m % GROUP
        angle = tl.load(positions_ptr + row, mask=row_ok, other=0) - shift
        # cos is even and sin is odd, so the table need not hold negative positions.
        table = tl.where(angle < 0, -angle, angle).to(tl.int64)
        table_ok = (row_ok & (table < num_positions))[:, None] & half_ok[None, :]
        at = table[:, None] * HALF + half[None, :]
        # A position past the table gives NaN: loud, and in bounds.
        cos = tl.load(cos_ptr + at, mask=table_ok, other=float("nan"))
        sin = tl.load(sin_ptr + at, mask=table_ok, other=float("nan"))
        sin = tl.where((angle < 0)[:, None], -sin, sin)
        q_ok = row_ok[:, None] & half_ok[None, :]
        q_at = q_ptr + row.to(tl.int64)[:, None] * q_stride_row + query_head[:, None] * q_stride_head + half[None, :]
        low = tl.load(q_at, mask=q_ok, other=0.0).to(tl.float32)
        high = tl.load(q_at + HALF, mask=q_ok, other=0.0).to(tl.float32)
        kind = k_ptr.dtype.element_ty
        q_low = tl.where(q_ok, low * cos - high * sin, 0.0).to(kind)
        q_high = tl.where(q_ok, high * cos + low * sin, 0.0).to(kind)

        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_HALF], tl.float32)
        for begin in range(0, length, BLOCK_N):
            span = begin + n
            slot = span % PAGE_SIZE
            # A tile within one page needs one address; else each key has its own.
            if PAGE_SIZE >= BLOCK_N:
                page_at = begin // PAGE_SIZE
                entry = tl.load(pages + page_at)
                page = (entry >> PAGE_BITS).to(tl.int64)
                k_at = k_ptr + page * k_stride_page + head * k_stride_head + slot[:, None] * k_stride_slot
                v_at = v_ptr + page * v_stride_page + head * v_stride_head + slot[:, None] * v_stride_slot
            else:
                page_at = span // PAGE_SIZE
                entry = tl.load(pages + page_at, mask=span < length, other=0)
                page = (entry >> PAGE_BITS).to(tl.int64)[:, None]
                k_at = k_ptr + page * k_stride_page + head * k_stride_head + slot[:, None] * k_stride_slot
                v_at = v_ptr + page * v_stride_page + head * v_stride_head + slot[:, None] * v_stride_slot
            key_ok = (slot < (entry & ((1 << PAGE_BITS) - 1))) & (span < length)
            k_at += half[None, :]
            k_ok = key_ok[:, None] & half_ok[None, :]
            k_low = tl.load(k_at, mask=k_ok, other=0.0)
            k_high = tl.load(k_at + HALF, mask=k_ok, other=0.0)
            score = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
            score = tl.dot(q_high, tl.trans(k_high), score, input_precision="ieee")
            seen = key_ok[None, :] & row_ok[:, None]
            if WINDOWED:
                if PAGE_SIZE >= BLOCK_N:
                    position = tl.load(starts + page_at) + slot
                else:
                    position = tl.load(starts + page_at, mask=span < length, other=0) + slot
                seen = seen & (angle[:, None] - position[None, :] < window)
            score = tl.where(seen, score * (scale * log2e), float("-inf"))
            peak = tl.maximum(largest, tl.max(score, 1))
            # While a row has seen nothing its peak is -inf, and -inf - -inf would be NaN.
            base = tl.where(peak == float("-inf"), 0.0, peak)
            keep = tl.exp2(largest - base)
            weight = tl.exp2(score - base[:, None])
            total = total * keep + tl.sum(weight, 1)
            value = tl.load(v_at + wide[None, :], mask=key_ok[:, None] & wide_ok[None, :], other=0.0)
            acc = tl.dot(weight.to(kind), value, acc * keep[:, None], input_precision="ieee")
            largest = peak

        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)
        lse = tl.where(empty, float("-inf"), (largest + tl.log2(divisor)) * ln2)
        state = (part + member).to(tl.int64) * NUM_HEADS + query_head
        tl.store(lse_ptr + state, lse, mask=row_ok)
        out_at = out_ptr + state[:, None] * HEAD_DIM + wide[None, :]
        tl.store(out_at, acc / divisor[:, None], mask=row_ok[:, None] & wide_ok[None, :])


class Tile(NamedTuple):
    """How one configuration is compiled. block_n: keys a step of the loop."""

    block_n: int
    num_warps: int
    num_stages: int


def tile(head_dim: int, element_size: int, block_m: int) -> Tile:
    """The tile of a configuration, chosen by ahead-of-time builds for sm_80, sm_90, sm_100 and gfx942 so that none
    spills. Not timed.

    head_dim: as stored; element_size: bytes
    """
    wide = power_of_two(head_dim)
    if element_size == 4:
        if block_m == 16 and wide >= 128:
            return Tile(16, 4, 2)
        if block_m == 16:
            return Tile(32, 4, 2)
        if block_m == 32:
            return Tile(16, 4 if wide <= 128 else 8, 1)
        return Tile(16, 4, 1) if wide == 64 else Tile(16, 8, 2)
    # Four warps where registers last: the matrix instruction of sm_90 takes 64 rows by four warps.
    if block_m <= 64 and wide <= 128:
        return Tile(64 if block_m <= 32 or wide == 64 else 32, 4, 2)
    return Tile(32 if wide == 64 else 16, 8, 2)


def num_programs(device: torch.device) -> int:
    """The fixed grid of persistent programs."""
    if device.type != "cuda":
        return PROGRAMS_ELSEWHERE
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def launch_segment_attention(
    kernel: Any,
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
    segment_length: Tensor,
    out: Tensor, lse: Tensor, *, scale: float, window: int, block_m: int,
) -> None:  # fmt: skip
    """Fill `out` and `lse` at the parts that the tasks name. Arguments as `segment_attention`'s, which checks them.

    kernel: `segment_attention_kernel`, or that wrapped for tracing
    """
    _, num_kv_heads, page_size, head_dim = k.shape
    compiled = tile(head_dim, k.element_size(), block_m)
    kernel[(num_programs(q.device),)](
        q, q.stride(0), q.stride(1),
        positions,
        k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2),
        cos, sin, cos.shape[0],
        tasks, num_tasks, task_rows, task_pages, page_start, segment_length,
        out, lse,
        scale, window,
        NUM_KV_HEADS=num_kv_heads, GROUP=q.shape[1] // num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_HALF=max(16, power_of_two(head_dim // 2)),
        PAGE_SIZE=page_size, BLOCK_M=block_m, BLOCK_N=compiled.block_n,
        TASK_FIELDS=tasks.shape[1], WINDOWED=window > 0, PAGE_BITS=PAGE_BITS,
        num_warps=compiled.num_warps, num_stages=compiled.num_stages,
    )  # fmt: skip


def shipped(head_dim: int, dtype: torch.dtype, page_size: int, block_m: int, group: int, windowed: bool) -> Config:
    """One configuration, as `launch_segment_attention` launches it, to be built ahead of time."""
    pool = pointer(dtype)
    compiled = tile(head_dim, dtype.itemsize, block_m)
    # fp32 products are exact (`input_precision="ieee"`), which no matrix instruction of NVIDIA's gives.
    matrix: Matrix = "none" if dtype == torch.float32 else "wgmma" if block_m >= 64 else "mma"
    name = f"segment_attention-{pool[1:]}-d{head_dim}-p{page_size}-m{block_m}-g{group}{'-window' * windowed}"
    return Config(
        name,
        segment_attention_kernel,
        {
            "q_ptr": pool, "q_stride_row": "i32", "q_stride_head": "i32", "positions_ptr": "*i32",
            "k_ptr": pool, "k_stride_page": "i32", "k_stride_head": "i32", "k_stride_slot": "i32",
            "v_ptr": pool, "v_stride_page": "i32", "v_stride_head": "i32", "v_stride_slot": "i32",
            "cos_ptr": "*fp32", "sin_ptr": "*fp32", "num_positions": "i32",
            "tasks_ptr": "*i32", "num_tasks_ptr": "*i32", "task_rows_ptr": "*i32", "task_pages_ptr": "*i32",
            "page_start_ptr": "*i32", "segment_length_ptr": "*i32", "out_ptr": "*fp32", "lse_ptr": "*fp32",
            "scale": "fp32", "window": "i32",
        },
        {
            "NUM_KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim,
            "BLOCK_HALF": max(16, power_of_two(head_dim // 2)), "PAGE_SIZE": page_size, "BLOCK_M": block_m,
            "BLOCK_N": compiled.block_n, "TASK_FIELDS": TASK_FIELDS, "WINDOWED": windowed,
            "PAGE_BITS": PAGE_BITS,
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
    for block_m, group, windowed in ((16, 4, False), (32, 3, False), (64, 4, False), (64, 1, True), (128, 4, False))
    if supports(block_m, head_dim, dtype)
)
"""What an engine may ask for; the query group and the window change no tile, so a few of each stand for all."""
