"""The frequencies of each kind of rotary embedding that the model family uses."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from anabranch.kernels import rope as kernel
from anabranch.kernels.rope import rotate
from anabranch.runtime.config import RopeConfig

__all__ = ["inverse_frequencies", "rope_table", "rotate"]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2], fp32, radians per position, highest first.

    fp32 step by step in the order of the published implementation: the frequencies are part of what the checkpoint
    means, and a rounding of 6e-8 in one moves a logit visibly at large positions.
    Sources: Su et al. 2021; `linear`: Chen et al. 2023; `llama3`: the Llama 3.1 release; `yarn`: Peng et al. 2023.
    """
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim)
    plain = 1.0 / powers
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, head_dim, powers)
        case "given":
            return torch.tensor(rope.frequencies, dtype=torch.float32)
        case _:
            assert_never(rope.kind)


def rope_table(rope: RopeConfig, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) for `rotate`, each [num_tokens, head_dim] of `dtype`; positions: [num_tokens], int64."""
    frequencies = inverse_frequencies(rope, head_dim).to(positions.device)
    return kernel.rope_table(frequencies, positions, rope.attention_factor, dtype)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, and those between are blended."""
    context, low, high = rope.original_context, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > context / low, plain / rope.factor, plain)
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, head_dim: int, powers: Tensor) -> Tensor:
    """Dimensions that turn often are kept, those that turn rarely are stretched, with a linear ramp between."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        turns = rope.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept
