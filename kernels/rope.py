"""Rotary position embedding, applied to one head vector at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    inverse_frequencies: Tensor, positions: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factors of `rotate` for each position.

    inverse_frequencies: [head_dim / 2], float, radians per position
    positions: [num_tokens], int64; may be negative (a query rotated by position less shift)
    scale: on both factors (YaRN's attention factor; 1 elsewhere)
    Returns (cos, sin), each [num_tokens, head_dim], `dtype`. The first half of `sin` is negated, so that `rotate` is
    two products and a sum.
    Angles are computed in fp64: in fp32 an angle near position 8192 would be off by 5e-4.
    Source: Su et al. 2021, with the two members of a pair head_dim / 2 apart, as in the published checkpoints.
    """
    angles = positions.to(torch.float64)[:, None] * inverse_frequencies.to(torch.float64)[None, :]
    cos = angles.cos().mul_(scale).to(dtype)
    sin = angles.sin().mul_(scale).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[..., i], x[..., i + head_dim / 2]) of each head.

    x: [num_tokens, num_heads, head_dim]
    cos, sin: [num_tokens, head_dim], as `rope_table` gives them, of x's dtype
    Returns [num_tokens, num_heads, head_dim], contiguous.
    Law: the product of a query rotated to position p and a key rotated to q depends on p - q alone.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos[:, None, :], swapped, sin[:, None, :])
