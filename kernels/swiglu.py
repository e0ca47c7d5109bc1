"""The gated activation of the feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x * sigmoid(x).

    gate, up: [num_tokens, size], of one dtype; views of a wider row are fine
    Returns [num_tokens, size], contiguous.
    Source: Shazeer 2020.
    """
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """`swiglu` of the two halves of a row, as one linear gives them: computed in fp32 and rounded once.

    gate_up: [num_rows, 2 * size], fp32, fp16 or bf16; any row stride, the last dimension contiguous
    Returns [num_rows, size], contiguous, of the same dtype.
    The op `anabranch::swiglu`: Triton on a GPU, `swiglu_packed_torch` on a CPU.
    Raises ValueError for a dtype or shape that is not supported.
    Source: Shazeer 2020.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1]:
        raise ValueError(f"gate_up is [num_rows, 2 * size], not {list(gate_up.shape)}")
    if gate_up.dtype not in DTYPES:
        raise ValueError(f"gate_up is fp32, fp16 or bf16, not {gate_up.dtype}")
    if gate_up.stride(1) != 1:
        raise ValueError("the rows of gate_up are contiguous")
    gated: Tensor = _swiglu(gate_up)
    return gated


def swiglu_packed_torch(gate_up: Tensor) -> Tensor:
    """The definition of `swiglu_packed`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@define_op("anabranch::swiglu")
def _swiglu(gate_up: Tensor) -> Tensor:
    if takes_torch(gate_up):
        return swiglu_packed_torch(gate_up)
    from anabranch.kernels.swiglu_triton import launch_swiglu, swiglu_kernel

    out = _half(gate_up)
    launch_swiglu(wrap(swiglu_kernel), gate_up, out)
    return out


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


_swiglu.register_fake(_half)
