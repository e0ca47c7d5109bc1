"""The Triton kernel behind `merge_parts`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit, power_of_two
from anabranch.kernels.shipped import Config, pointer

if HAS_TRITON:
    import triton.language as tl

# Parts that are loaded at once: enough loads in flight for one warp, and a 32k context in 1,024-token chunks takes two
# rounds. Not measured.
BLOCK_PARTS = 16
NUM_WARPS = 2
NUM_STAGES = 2


@jit
def merge_parts_kernel(
    out_parts_ptr, lse_parts_ptr, row_parts_indptr_ptr, row_parts_ptr, out_ptr, lse_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """One program a (row, head): its partial states in order, as `merge_parts_torch` defines it."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_DIM)
    dim_ok = dim < HEAD_DIM
    lane = tl.arange(0, BLOCK_PARTS)
    begin = tl.load(row_parts_indptr_ptr + row)
    stop = tl.load(row_parts_indptr_ptr + row + 1)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    for first in range(begin, stop, BLOCK_PARTS):
        index = first + lane
        part = tl.load(row_parts_ptr + index, mask=index < stop, other=0).to(tl.int64) * NUM_HEADS + head
        lse = tl.load(lse_parts_ptr + part, mask=index < stop, other=float("-inf"))
        # Whatever stands beside an lse of -inf is not read.
        some = (lse > float("-inf"))[:, None] & dim_ok[None, :]
        out = tl.load(out_parts_ptr + part[:, None] * HEAD_DIM + dim[None, :], mask=some, other=0.0)
        peak = tl.maximum(largest, tl.max(lse, 0))
        base = tl.where(peak > float("-inf"), peak, 0.0)
        keep = tl.exp(largest - base)
        weight = tl.exp(lse - base)
        acc = acc * keep + tl.sum(out * weight[:, None], 0)
        total = total * keep + tl.sum(weight, 0)
        largest = peak
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    state = row * NUM_HEADS + head
    one = tl.arange(0, 1)
    tl.store(lse_ptr + state + one, tl.where(empty, float("-inf"), largest + tl.log(divisor)))
    tl.store(out_ptr + state * HEAD_DIM + dim, (acc / divisor).to(out_ptr.dtype.element_ty), mask=dim_ok)


def launch_merge_parts(
    kernel: Any, out_parts: Tensor, lse_parts: Tensor, row_parts_indptr: Tensor, row_parts: Tensor, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `lse`, contiguous. Other arguments as `merge_parts`'s, which checks them.

    kernel: `merge_parts_kernel`, or that wrapped for tracing
    """
    num_rows, num_heads, head_dim = out.shape
    if num_rows and num_heads:
        kernel[(num_rows, num_heads)](
            out_parts, lse_parts, row_parts_indptr, row_parts, out, lse,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_DIM=power_of_two(head_dim), BLOCK_PARTS=BLOCK_PARTS,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip


SHIPPED = tuple(
    Config(
        f"merge_states-{pointer(dtype)[1:]}-d{head_dim}",
        merge_parts_kernel,
        {
            "out_parts_ptr": "*fp32", "lse_parts_ptr": "*fp32", "row_parts_indptr_ptr": "*i32", "row_parts_ptr": "*i32",
            "out_ptr": pointer(dtype), "lse_ptr": "*fp32",
        },
        {"NUM_HEADS": 32, "HEAD_DIM": head_dim, "BLOCK_DIM": power_of_two(head_dim), "BLOCK_PARTS": BLOCK_PARTS},
        NUM_WARPS,
        NUM_STAGES,
        "none",
    )
    for head_dim in (64, 80, 96, 128, 256)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
)  # fmt: skip
"""What `merge_parts` may launch; the number of heads moves nothing."""
