"""Merge of attention states by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(out: Tensor, lse: Tensor) -> Tensor:
    """Attention over all parts together, from attention over each.

    out: [num_rows, num_parts, num_heads, head_dim], any float dtype; a part that a row does not have may hold anything
        finite
    lse: [num_rows, num_parts, num_heads], same dtype, natural log; -inf is the unit (a part that a row does not have)
    Returns [num_rows, num_heads, head_dim].
    Laws: a permutation of the parts changes the result by rounding alone; one part is the identity.
    Source: Milakov and Gimelshein 2018; the merge step of split-KV attention in FlashInfer and FlashDecoding.
    """
    weight = torch.softmax(lse, dim=1)
    return torch.einsum("rph,rphd->rhd", weight, out)
