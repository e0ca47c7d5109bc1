"""From the projections of a step to the KV pool: norm the heads, rotate the keys, write keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap
from anabranch.kernels.norms import rms_norm_residual_torch
from anabranch.kernels.segment_attention import DTYPES, HEAD_DIMS


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Write a step's keys and values to their slots, and return its queries as attention takes them.

    q: [num_rows, num_heads, head_dim]; k, v: [num_rows, num_kv_heads, head_dim]; of one dtype of fp32, fp16 and bf16,
        any strides but head_dim contiguous, so that views of one row of projections will do
    positions: [num_rows], int32, contiguous: where the token of each row stands, from 0 to num_positions - 1
    slots: [num_rows], int64, contiguous: page * page_size + slot in the page, each at most once; -1 writes nothing
    cos, sin: [num_positions, head_dim / 2], fp32, contiguous, as `segment_attention`'s
    k_pool, v_pool: [num_pages, num_kv_heads, page_size, head_dim], the type of k, any strides but head_dim contiguous;
        written at the slots and nowhere else
    q_norm, k_norm: [head_dim], the type of q, contiguous: weights of an RMS norm of each head (Qwen3's), or None
    eps: of those norms
    Keys are normed and rounded, then rotated in fp32 and rounded. Queries are normed and not rotated: attention rotates
    them for each shift that they see keys under.
    Returns the queries, [num_rows, num_heads, head_dim], contiguous.
    The op `anabranch::rope_append`, which mutates the pools: Triton on a GPU, `rope_append_torch` on a CPU. On a GPU,
    which can't raise, a position past the table writes a key of NaN, and a slot past the pool is not written.
    Raises ValueError for a head size, dtype or shape that is not supported.
    Source: Su et al. 2021 (the members of a pair head_dim / 2 apart); one pass from projections to a paged cache as in
    vLLM's and FlashInfer's append kernels.
    """
    _check(q, k, v, positions, slots, cos, sin, k_pool, v_pool, q_norm, k_norm)
    out: Tensor = _rope_append(q, k, v, positions, slots, cos, sin, k_pool, v_pool, q_norm, k_norm, eps)
    return out


def rope_append_torch(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """The definition of `rope_append`."""
    if k_norm is not None:
        k = rms_norm_residual_torch(k, None, k_norm, eps)[0]
    low, high = k.float().chunk(2, dim=-1)
    c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
    keys = torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(k.dtype)
    written = slots >= 0
    page_size = k_pool.shape[2]
    page, slot = slots[written] // page_size, slots[written] % page_size
    k_pool[page, :, slot] = keys[written]
    v_pool[page, :, slot] = v[written]
    return _contiguous_like(q).copy_(q if q_norm is None else rms_norm_residual_torch(q, None, q_norm, eps)[0])


def _check(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
) -> None:  # fmt: skip
    num_rows, num_heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"a head size of {head_dim} is not supported: it is one of {HEAD_DIMS}")
    if k.shape != v.shape or k.shape[0] != num_rows or k.shape[2] != head_dim:
        raise ValueError(f"keys of {list(k.shape)} and values of {list(v.shape)} do not go with q of {list(q.shape)}")
    num_kv_heads = k.shape[1]
    if not num_kv_heads or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    pool = (num_kv_heads, head_dim)
    if k_pool.shape != v_pool.shape or k_pool.dim() != 4 or (k_pool.shape[1], k_pool.shape[3]) != pool:
        raise ValueError(
            f"pools of {list(k_pool.shape)} and {list(v_pool.shape)} are no [num_pages, {num_kv_heads}, page_size, "
            f"{head_dim}]"
        )
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in (k, v, k_pool, v_pool, *norms)):
        raise ValueError("q, k, v, the pools and the norms share one type of fp32, fp16 and bf16")
    if any(norm.shape != (head_dim,) for norm in norms):
        raise ValueError(f"q_norm and k_norm are [{head_dim}]")
    if any(x.stride(-1) != 1 for x in (q, k, v, k_pool, v_pool, *norms)):
        raise ValueError("q, k, v, the pools and the norms are contiguous in head_dim")
    if positions.shape != (num_rows,) or positions.dtype != torch.int32 or not positions.is_contiguous():
        raise ValueError(f"positions are int32 [{num_rows}], contiguous")
    if slots.shape != (num_rows,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots are int64 [{num_rows}], contiguous")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != head_dim // 2:
        raise ValueError(f"cos and sin are [num_positions, {head_dim // 2}]")
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in (cos, sin)):
        raise ValueError("cos and sin are fp32 and contiguous")


# Opaque to tracing, since which rows are written follows the data.
@torch.library.custom_op("anabranch::rope_append_cpu", mutates_args=("k_pool", "v_pool"))
def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    return rope_append_torch(q, k, v, positions, slots, cos, sin, k_pool, v_pool, q_norm, k_norm, eps)


@define_op("anabranch::rope_append", mutates_args=("k_pool", "v_pool"))
def _rope_append(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    if takes_torch(q):
        on_cpu: Tensor = _on_cpu(q, k, v, positions, slots, cos, sin, k_pool, v_pool, q_norm, k_norm, eps)
        return on_cpu
    from anabranch.kernels.rope_append_triton import launch_rope_append, rope_append_kernel

    out = _contiguous_like(q)
    launch_rope_append(
        wrap(rope_append_kernel),
        q, k, v, positions, slots, cos, sin, k_pool, v_pool, q_norm, k_norm, out, eps=eps,
    )  # fmt: skip
    return out


def _contiguous_like(q: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    return _contiguous_like(q)


_on_cpu.register_fake(_fake)
_rope_append.register_fake(_fake)
