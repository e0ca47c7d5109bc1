"""The Triton kernel behind `rms_norm_residual`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit, power_of_two
from anabranch.kernels.norms import DTYPES, MAX_SIZE
from anabranch.kernels.shipped import Config, pointer

if HAS_TRITON:
    import triton.language as tl


@jit
def rms_norm_kernel(
    x_ptr, x_stride_row, added_ptr, added_stride_row, weight_ptr, normed_ptr, hidden_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """One program a row, as `rms_norm_residual_torch` defines it. The outputs are contiguous.

    ADDED: `added` is there, and `hidden` is written
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    ok = at < SIZE
    x = tl.load(x_ptr + row * x_stride_row + at, mask=ok, other=0.0)
    if ADDED:
        added = tl.load(added_ptr + row * added_stride_row + at, mask=ok, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(hidden_ptr + row * SIZE + at, x, mask=ok)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * SIZE + at, (wide * scale * weight).to(x.dtype), mask=ok)


def num_warps(block: int) -> int:
    """16 numbers a thread, up to the 16 warps that leave a thread registers. Not timed."""
    return min(16, max(1, block // 512))


def launch_rms_norm(
    kernel: Any, x: Tensor, added: Tensor | None, weight: Tensor, normed: Tensor, hidden: Tensor | None, *, eps: float
) -> None:
    """Fill `normed` and, with `added`, `hidden`, contiguous. Arguments as `rms_norm_residual`'s, which checks them.

    kernel: `rms_norm_kernel`, or that wrapped for tracing
    """
    num_rows, size = x.shape
    block = power_of_two(size)
    # What is not there is not read; some pointer must stand for it.
    more, out = (x, normed) if added is None or hidden is None else (added, hidden)
    if num_rows:
        kernel[(num_rows,)](
            x, x.stride(0), more, more.stride(0), weight, normed, out, eps,
            SIZE=size, BLOCK=block, ADDED=added is not None, num_warps=num_warps(block),
        )  # fmt: skip


def shipped(size: int, dtype: torch.dtype, added: bool) -> Config:
    """One configuration, as `launch_rms_norm` launches it, to be built ahead of time."""
    kind = pointer(dtype)
    block = power_of_two(size)
    return Config(
        f"rms_norm-{kind[1:]}-{size}{'-residual' * added}",
        rms_norm_kernel,
        {
            "x_ptr": kind, "x_stride_row": "i32", "added_ptr": kind, "added_stride_row": "i32", "weight_ptr": kind,
            "normed_ptr": kind, "hidden_ptr": kind, "eps": "fp32",
        },
        {"SIZE": size, "BLOCK": block, "ADDED": added},
        num_warps(block),
        num_stages=3,
        matrix="none",
    )  # fmt: skip


SHIPPED = tuple(
    shipped(size, dtype, added)
    for size in (576, 1024, 4096, 8192, MAX_SIZE)
    for dtype in DTYPES
    for added in (False, True)
)
"""Sizes of published models, and the largest; any up to it is compiled on first use."""
