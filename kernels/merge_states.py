"""Merge of attention states by log-sum-exp, as it is fastest and in a fixed order."""

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


def weigh_parts(lse: Tensor) -> tuple[Tensor, Tensor]:
    """What each part counts for, relative to the row's largest.

    lse: [num_parts, ...], natural log; -inf is the unit
    Returns (weight of lse's shape, high [...]): weight = exp(lse - high), and high = the largest lse, or the least
    finite number where every part is the unit (all weights are 0 then).
    """
    high = lse.amax(0).clamp_(min=torch.finfo(lse.dtype).min)
    return (lse - high).exp_(), high


def sum_parts_(x: Tensor) -> Tensor:
    """The sum over dim 0 of [num_parts, ...], in place: returns its first row.

    Law: the order of additions to a column depends on the places of its terms alone. Zeros in further rows change no
    bit, for a row i is added to the one half the next power of two below it, and 0 is exact.
    """
    count = x.shape[0]
    while count > 1:
        half = 1 << ((count - 1).bit_length() - 1)
        x[: count - half].add_(x[half:count])
        count = half
    return x[0]


def fold_(high: Tensor, total: Tensor, out: Tensor, more_high: Tensor, more_total: Tensor, more_out: Tensor) -> None:
    """Add a further state to a running one, in place.

    high, total: [...]; out: [..., head_dim]: the attended value is out / total, and counts for exp(high) * total
    Law: the state (least finite number, 0, 0) is the unit, exactly.
    """
    top = torch.maximum(high, more_high)
    keep, add = (high - top).exp_(), (more_high - top).exp_()
    total.mul_(keep).add_(more_total * add)
    out.mul_(keep[..., None]).add_(more_out * add[..., None])
    high.copy_(top)
