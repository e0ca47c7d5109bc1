"""The Triton kernel behind `rope_append`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit, power_of_two
from anabranch.kernels.segment_attention import DTYPES, HEAD_DIMS, PAGE_SIZES
from anabranch.kernels.shipped import Config, pointer

if HAS_TRITON:
    import triton.language as tl

# A program holds one key, one value and a query group: a few hundred numbers. Not measured.
NUM_WARPS = 1
NUM_STAGES = 1


@jit
def rope_append_kernel(
    q_ptr, q_stride_row, q_stride_head,
    k_ptr, k_stride_row, k_stride_head,
    v_ptr, v_stride_row, v_stride_head,
    positions_ptr, slots_ptr, cos_ptr, sin_ptr, num_positions,
    k_pool_ptr, k_pool_stride_page, k_pool_stride_head, k_pool_stride_slot,
    v_pool_ptr, v_pool_stride_page, v_pool_stride_head, v_pool_stride_slot, num_slots,
    q_norm_ptr, k_norm_ptr, eps,
    out_ptr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """One program a (row, KV head): its key, its value and its query group, as `rope_append_torch` defines it.

    BLOCK_HALF: head_dim / 2, rounded up to a power of two: keys are held as the two members of their rotary pairs
    Q_NORM, K_NORM: the norms are there
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    # 64 bits: with the KV head outermost, a head's stride is that of the whole pool.
    head = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)
    half_ok = half < HALF
    wide = tl.arange(0, 2 * BLOCK_HALF)
    wide_ok = wide < HEAD_DIM

    member = tl.arange(0, BLOCK_GROUP)
    query_head = head * GROUP + member
    q_ok = (member < GROUP)[:, None] & wide_ok[None, :]
    q_at = q_ptr + row * q_stride_row + query_head[:, None] * q_stride_head + wide[None, :]
    q = tl.load(q_at, mask=q_ok, other=0.0)
    if Q_NORM:
        exact = q.to(tl.float32)
        q_scale = 1.0 / tl.sqrt_rn(tl.sum(exact * exact, 1) / HEAD_DIM + eps)
        weight = tl.load(q_norm_ptr + wide, mask=wide_ok, other=0.0).to(tl.float32)
        q = (exact * q_scale[:, None] * weight[None, :]).to(q.dtype)
    out_at = out_ptr + (row * (NUM_KV_HEADS * GROUP) + query_head)[:, None] * HEAD_DIM + wide[None, :]
    tl.store(out_at, q, mask=q_ok)

    slot = tl.load(slots_ptr + row)
    if (slot >= 0) & (slot < num_slots):
        page = slot // PAGE_SIZE
        slot = slot % PAGE_SIZE
        k_at = k_ptr + row * k_stride_row + head * k_stride_head + half
        low = tl.load(k_at, mask=half_ok, other=0.0)
        high = tl.load(k_at + HALF, mask=half_ok, other=0.0)
        kind = low.dtype
        low_exact = low.to(tl.float32)
        high_exact = high.to(tl.float32)
        if K_NORM:
            square = tl.sum(low_exact * low_exact + high_exact * high_exact, 0)
            scale = 1.0 / tl.sqrt_rn(square / HEAD_DIM + eps)
            low_weight = tl.load(k_norm_ptr + half, mask=half_ok, other=0.0).to(tl.float32)
            high_weight = tl.load(k_norm_ptr + HALF + half, mask=half_ok, other=0.0).to(tl.float32)
            low_exact = (low_exact * scale * low_weight).to(kind).to(tl.float32)
            high_exact = (high_exact * scale * high_weight).to(kind).to(tl.float32)
        position = tl.load(positions_ptr + row).to(tl.int64)
        # A position past the table gives NaN: loud, and in bounds.
        table_ok = half_ok & (position >= 0) & (position < num_positions)
        cos = tl.load(cos_ptr + position * HALF + half, mask=table_ok, other=float("nan"))
        sin = tl.load(sin_ptr + position * HALF + half, mask=table_ok, other=float("nan"))
        to_k = k_pool_ptr + page * k_pool_stride_page + head * k_pool_stride_head + slot * k_pool_stride_slot + half
        tl.store(to_k, (low_exact * cos - high_exact * sin).to(kind), mask=half_ok)
        tl.store(to_k + HALF, (high_exact * cos + low_exact * sin).to(kind), mask=half_ok)
        value = tl.load(v_ptr + row * v_stride_row + head * v_stride_head + wide, mask=wide_ok, other=0.0)
        to_v = v_pool_ptr + page * v_pool_stride_page + head * v_pool_stride_head + slot * v_pool_stride_slot + wide
        tl.store(to_v, value, mask=wide_ok)


def launch_rope_append(
    kernel: Any,
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, out: Tensor, *, eps: float,
) -> None:  # fmt: skip
    """Write to the pools, and fill `out`, contiguous. Arguments as `rope_append`'s, which checks them.

    kernel: `rope_append_kernel`, or that wrapped for tracing
    """
    num_rows, num_kv_heads, head_dim = k.shape
    num_pages, _, page_size, _ = k_pool.shape
    group = q.shape[1] // num_kv_heads
    if not num_rows:
        return
    kernel[(num_rows, num_kv_heads)](
        q, q.stride(0), q.stride(1),
        k, k.stride(0), k.stride(1),
        v, v.stride(0), v.stride(1),
        positions, slots, cos, sin, cos.shape[0],
        k_pool, k_pool.stride(0), k_pool.stride(1), k_pool.stride(2),
        v_pool, v_pool.stride(0), v_pool.stride(1), v_pool.stride(2), num_pages * page_size,
        # A norm that is not there is not read; some pointer must stand for it.
        q if q_norm is None else q_norm, k if k_norm is None else k_norm, eps,
        out,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_HALF=power_of_two(head_dim // 2),
        BLOCK_GROUP=power_of_two(group), PAGE_SIZE=page_size,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def shipped(head_dim: int, dtype: torch.dtype, page_size: int, group: int, norm: bool) -> Config:
    """One configuration, as `launch_rope_append` launches it, to be built ahead of time."""
    kind = pointer(dtype)
    return Config(
        f"rope_append-{kind[1:]}-d{head_dim}-p{page_size}-g{group}{'-norm' * norm}",
        rope_append_kernel,
        {
            "q_ptr": kind, "q_stride_row": "i32", "q_stride_head": "i32",
            "k_ptr": kind, "k_stride_row": "i32", "k_stride_head": "i32",
            "v_ptr": kind, "v_stride_row": "i32", "v_stride_head": "i32",
            "positions_ptr": "*i32", "slots_ptr": "*i64", "cos_ptr": "*fp32", "sin_ptr": "*fp32",
            "num_positions": "i32",
            "k_pool_ptr": kind, "k_pool_stride_page": "i32", "k_pool_stride_head": "i32", "k_pool_stride_slot": "i32",
            "v_pool_ptr": kind, "v_pool_stride_page": "i32", "v_pool_stride_head": "i32", "v_pool_stride_slot": "i32",
            "num_slots": "i32", "q_norm_ptr": kind, "k_norm_ptr": kind, "eps": "fp32", "out_ptr": kind,
        },
        {
            "NUM_KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_HALF": power_of_two(head_dim // 2),
            "BLOCK_GROUP": power_of_two(group), "PAGE_SIZE": page_size, "Q_NORM": norm, "K_NORM": norm,
        },
        NUM_WARPS,
        NUM_STAGES,
        "none",
    )  # fmt: skip


SHIPPED = tuple(
    shipped(head_dim, dtype, page_size, group, norm)
    for head_dim in HEAD_DIMS
    for dtype in DTYPES
    for page_size in PAGE_SIZES
    for group, norm in ((4, False), (3, True))
)
"""What an engine may ask for; a few query groups stand for all."""
