"""The Triton kernel behind `swiglu_packed`."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from typing import Any

from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit
from anabranch.kernels.shipped import Config, pointer
from anabranch.kernels.swiglu import DTYPES

if HAS_TRITON:
    import triton.language as tl

# Eight numbers a thread: one 16-byte load of 16-bit numbers. Not measured.
BLOCK = 1024
NUM_WARPS = 4


@jit
def swiglu_kernel(gate_up_ptr, gate_up_stride_row, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a (row, block of columns), as `swiglu_packed_torch` defines it. The output is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < SIZE
    from_row = gate_up_ptr + row * gate_up_stride_row + at
    gate = tl.load(from_row, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(from_row + SIZE, mask=ok, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + at, gated.to(out_ptr.dtype.element_ty), mask=ok)


def launch_swiglu(kernel: Any, gate_up: Tensor, out: Tensor) -> None:
    """Fill `out`, contiguous. `gate_up` as `swiglu_packed`'s, which checks it.

    kernel: `swiglu_kernel`, or that wrapped for tracing
    """
    num_rows, size = out.shape
    if num_rows:
        kernel[(num_rows, -(-size // BLOCK))](
            gate_up, gate_up.stride(0), out, SIZE=size, BLOCK=BLOCK, num_warps=NUM_WARPS
        )


SHIPPED = tuple(
    Config(
        f"swiglu-{pointer(dtype)[1:]}-{size}",
        swiglu_kernel,
        {"gate_up_ptr": pointer(dtype), "gate_up_stride_row": "i32", "out_ptr": pointer(dtype)},
        {"SIZE": size, "BLOCK": BLOCK},
        NUM_WARPS,
        num_stages=3,
        matrix="none",
    )
    for size in (1536, 3072, 14336)
    for dtype in DTYPES
)
"""Sizes of published models; any other is compiled on first use."""
