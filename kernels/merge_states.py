"""Merge of attention states by log-sum-exp, as it is fastest and in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap


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


def merge_parts(
    out_parts: Tensor, lse_parts: Tensor, row_parts_indptr: Tensor, row_parts: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`merge_states` where each row has a number of parts of its own.

    out_parts: [num_parts, num_heads, head_dim], fp32; what stands beside an lse of -inf is not read
    lse_parts: [num_parts, num_heads], fp32, natural log; -inf is the unit
    row_parts_indptr: [num_rows + 1], int32; row_parts: int32. The parts of row i are
        row_parts[row_parts_indptr[i] : row_parts_indptr[i + 1]], merged in that order; a row may have none.
    dtype: of the merged output
    Returns out [num_rows, num_heads, head_dim], `dtype`, and lse [num_rows, num_heads], fp32; 0 and -inf for a row that
    sees nothing.
    The op `anabranch::merge_states`: Triton on a GPU, `merge_parts_torch` on a CPU.
    Raises ValueError if shapes or dtypes differ from these.
    Laws: as `merge_states`; a row's bits depend on its own parts and their order alone.
    """
    if out_parts.dim() != 3 or lse_parts.shape != out_parts.shape[:2]:
        raise ValueError(f"parts of {list(out_parts.shape)} do not go with an lse of {list(lse_parts.shape)}")
    if out_parts.dtype != torch.float32 or lse_parts.dtype != torch.float32:
        raise ValueError(f"partial states are fp32, not {out_parts.dtype} and {lse_parts.dtype}")
    if row_parts_indptr.dtype != torch.int32 or row_parts.dtype != torch.int32:
        raise ValueError("row_parts_indptr and row_parts are int32")
    if row_parts_indptr.numel() == 0:
        raise ValueError("row_parts_indptr has num_rows + 1 entries")
    merged: tuple[Tensor, Tensor] = _merge_states(out_parts, lse_parts, row_parts_indptr, row_parts, dtype)
    return merged


def merge_parts_torch(
    out_parts: Tensor, lse_parts: Tensor, row_parts_indptr: Tensor, row_parts: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition of `merge_parts`."""
    num_rows = row_parts_indptr.numel() - 1
    out = out_parts.new_zeros(num_rows, *out_parts.shape[1:])
    lse = lse_parts.new_full((num_rows, lse_parts.shape[1]), float("-inf"))
    bounds = row_parts_indptr.tolist()
    for row in range(num_rows):
        parts = row_parts[bounds[row] : bounds[row + 1]].long()
        of_parts = lse_parts[parts]
        if not len(parts):
            continue
        lse[row] = torch.logsumexp(of_parts, dim=0)
        weight = torch.exp(of_parts - lse[row].clamp(min=torch.finfo(torch.float32).min))
        seen = out_parts[parts].masked_fill(torch.isneginf(of_parts)[..., None], 0)
        out[row] = torch.einsum("ph,phd->hd", weight, seen)
    return out.to(dtype), lse


# Opaque to tracing, since its loops follow the data.
@torch.library.custom_op("anabranch::merge_states_cpu", mutates_args=())
def _merge_on_cpu(
    out_parts: Tensor, lse_parts: Tensor, row_parts_indptr: Tensor, row_parts: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return merge_parts_torch(out_parts, lse_parts, row_parts_indptr, row_parts, dtype)


@define_op("anabranch::merge_states")
def _merge_states(
    out_parts: Tensor, lse_parts: Tensor, row_parts_indptr: Tensor, row_parts: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if takes_torch(out_parts):
        merged: tuple[Tensor, Tensor] = _merge_on_cpu(out_parts, lse_parts, row_parts_indptr, row_parts, dtype)
        return merged
    from anabranch.kernels.merge_states_triton import launch_merge_parts, merge_parts_kernel

    out, lse = _fake(out_parts, lse_parts, row_parts_indptr, row_parts, dtype)
    kernel = wrap(merge_parts_kernel)
    launch_merge_parts(kernel, out_parts.contiguous(), lse_parts.contiguous(), row_parts_indptr, row_parts, out, lse)
    return out, lse


def _fake(
    out_parts: Tensor, lse_parts: Tensor, row_parts_indptr: Tensor, row_parts: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (row_parts_indptr.shape[0] - 1, out_parts.shape[1], out_parts.shape[2])
    return out_parts.new_empty(shape, dtype=dtype), lse_parts.new_empty(shape[:2])


_merge_on_cpu.register_fake(_fake)
_merge_states.register_fake(_fake)


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
