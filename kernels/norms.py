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
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
