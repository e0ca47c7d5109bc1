"""What is shipped of each kernel, as the ahead-of-time builds and their checks read it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Matrix: TypeAlias = Literal["none", "mma", "wgmma"]


class Config(NamedTuple):
    """One kernel as one launch specialises it.

    fn: the kernel; signature: the type of each argument that is not a constant ("*fp16", "i32", "fp32"), in any order
    constexprs: the value of each that is
    matrix: the matrix instruction that is expected where the target has it: "wgmma" is Hopper's, and stands for the
        class that other targets have for such a tile
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, int | bool]
    num_warps: int
    num_stages: int
    matrix: Matrix


def pointer(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to `dtype`."""
    return {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}[dtype]
