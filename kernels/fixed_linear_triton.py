"""The Triton kernel behind `fixed_linear`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.kernels.fixed_linear import BLOCK_ROWS, DTYPES
from anabranch.kernels.jit import HAS_TRITON, jit
from anabranch.kernels.shipped import Config, Matrix, pointer

if HAS_TRITON:
    import triton.language as tl


@jit
def fixed_linear_kernel(
    x_ptr, x_stride_row, weight_ptr, weight_stride_row, bias_ptr, out_ptr, out_stride_row, num_rows, num_out, num_in,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One tile of the output, as `fixed_linear_torch` defines it: no split over K, which goes in order.

    WHOLE_K: num_in is a multiple of BLOCK_K, so that no load is masked there
    """
    # Programs that run together share weights: the tiles of the rows come first in the grid.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_ok = m < num_rows
    out_ok = n < num_out
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride_row + inner[None, :]
    w_at = weight_ptr + n.to(tl.int64)[:, None] * weight_stride_row + inner[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, num_in, BLOCK_K):
        if WHOLE_K:
            x_ok = row_ok[:, None]
            w_ok = out_ok[:, None]
        else:
            inner_ok = begin + inner < num_in
            x_ok = row_ok[:, None] & inner_ok[None, :]
            w_ok = out_ok[:, None] & inner_ok[None, :]
        x = tl.load(x_at + begin, mask=x_ok, other=0.0)
        w = tl.load(w_at + begin, mask=w_ok, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(bias_ptr + n, mask=out_ok, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + m.to(tl.int64)[:, None] * out_stride_row + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & out_ok[None, :])


class Tile(NamedTuple):
    """How one configuration is compiled. block_n: outputs a tile; block_k: inputs a step of the loop."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tile(element_size: int) -> Tile:
    """The tile of a configuration, the same for every shape: a row's bits may depend on it. Not timed.

    element_size: bytes. A step reads 256 bytes of each weight row; narrow tiles make many programs, since a decode step
    has few rows and no split over K.
    """
    return Tile(32, 64, 4, 3) if element_size == 4 else Tile(32, 128, 4, 4)


def launch_fixed_linear(
    kernel: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, block_m: int
) -> None:
    """Fill `out` [num_rows, out], of any row stride. Arguments as `fixed_linear`'s, which checks them.

    kernel: `fixed_linear_kernel`, or that wrapped for tracing
    """
    num_rows, num_in = x.shape
    num_out = weight.shape[0]
    if not num_rows or not num_out:
        return
    compiled = tile(x.element_size())
    kernel[(-(-num_rows // block_m), -(-num_out // compiled.block_n))](
        x, x.stride(0), weight, weight.stride(0), weight if bias is None else bias, out, out.stride(0),
        num_rows, num_out, num_in,
        BLOCK_M=block_m, BLOCK_N=compiled.block_n, BLOCK_K=compiled.block_k,
        WHOLE_K=num_in % compiled.block_k == 0, BIASED=bias is not None,
        num_warps=compiled.num_warps, num_stages=compiled.num_stages,
    )  # fmt: skip


def shipped(dtype: torch.dtype, block_m: int, whole_k: bool, biased: bool) -> Config:
    """One configuration, as `launch_fixed_linear` launches it, to be built ahead of time."""
    kind = pointer(dtype)
    compiled = tile(dtype.itemsize)
    matrix: Matrix = "none" if dtype == torch.float32 else "mma"
    return Config(
        f"fixed_linear-{kind[1:]}-m{block_m}{'' if whole_k else '-odd'}{'-bias' * biased}",
        fixed_linear_kernel,
        {
            "x_ptr": kind, "x_stride_row": "i32", "weight_ptr": kind, "weight_stride_row": "i32", "bias_ptr": kind,
            "out_ptr": kind, "out_stride_row": "i32", "num_rows": "i32", "num_out": "i32", "num_in": "i32",
        },
        {
            "BLOCK_M": block_m, "BLOCK_N": compiled.block_n, "BLOCK_K": compiled.block_k, "WHOLE_K": whole_k,
            "BIASED": biased,
        },
        compiled.num_warps,
        compiled.num_stages,
        matrix,
    )  # fmt: skip


SHIPPED = tuple(
    shipped(dtype, block_m, whole_k, biased)
    for dtype in DTYPES
    for block_m in BLOCK_ROWS
    for whole_k, biased in ((True, False), (True, True), (False, True))
)
"""What an engine may ask for: every type and tile, with the masks that a model's sizes ask for."""
