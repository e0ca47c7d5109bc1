"""The gated activation of the feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x * sigmoid(x).

    gate, up: [num_tokens, size], of one dtype; views of a wider row are fine
    Returns [num_tokens, size], contiguous.
    Source: Shazeer 2020.
    """
    return torch.nn.functional.silu(gate).mul_(up)
