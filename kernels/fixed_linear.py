"""A linear layer whose rows do not know how many they are."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap

# Rows a tile. Both take the matrix instruction of 16 rows on every target: 64 would be another one on sm_90 and sm_100.
BLOCK_ROWS = (16, 32)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, block_m: int = 16) -> Tensor:
    """x @ weight.T + bias, summed in fp32 in an order that the number of rows does not change.

    x: [num_rows, in], fp32, fp16 or bf16; weight: [out, in]; bias: [out] or None, all of one type; in contiguous
    block_m: rows a tile, 16 or 32: a constant of the configuration
    Returns [num_rows, out], x's type.
    The op `anabranch::fixed_linear`: Triton on a GPU, `fixed_linear_torch` on a CPU.
    Raises ValueError if shapes, dtypes, strides or block_m differ from these.
    Law: a row's bits depend on its values, weight, bias and block_m alone, not on the other rows, their number or its
    place among them.
    Source: batch-invariant kernels after He et al. 2025, "Defeating nondeterminism in LLM inference".
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"rows of {list(x.shape)} do not go with a weight of {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias of {list(bias.shape)} does not go with a weight of {list(weight.shape)}")
    kinds = {t.dtype for t in (x, weight, bias) if t is not None}
    if x.dtype not in DTYPES or len(kinds) != 1:
        raise ValueError(
            f"x, weight and bias share one type of fp32, fp16 and bf16; they are {sorted(map(str, kinds))}"
        )
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (x, weight, bias) if t is not None):
        raise ValueError("x, weight and bias are contiguous in their last dimension")
    if block_m not in BLOCK_ROWS:
        raise ValueError(f"block_m={block_m} is one of {BLOCK_ROWS}")
    out: Tensor = _fixed_linear(x, weight, bias, block_m)
    return out


def fixed_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, block_m: int) -> Tensor:
    """The definition of `fixed_linear`: row by row, so that it keeps the law, too."""
    wide = weight.float().T
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    for row in range(x.shape[0]):
        out[row] = x[row].float() @ wide
    return (out if bias is None else out + bias.float()).to(x.dtype)


@define_op("anabranch::fixed_linear")
def _fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block_m: int) -> Tensor:
    if takes_torch(x):
        return fixed_linear_torch(x, weight, bias, block_m)
    from anabranch.kernels.fixed_linear_triton import fixed_linear_kernel, launch_fixed_linear

    out = _fake(x, weight, bias, block_m)
    launch_fixed_linear(wrap(fixed_linear_kernel), x, weight, bias, out, block_m=block_m)
    return out


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, block_m: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_fixed_linear.register_fake(_fake)
