"""Attention over runs of KV slots that several rows see: each run is read once for all of them.

Every function returns partial states (out, lse) that `merge_states` joins; lse is the natural log of the sum of the
exponentials of the scaled scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Float, double, half and bfloat16; returns the log-sum-exp beside the output, which the public SDPA call does not.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every row sees every key: one read of K and V for all rows.

    q: [num_rows, num_heads, head_dim]
    k, v: [num_kv_heads, num_keys, head_dim]; num_heads is a multiple of num_kv_heads, num_keys at least 1
    mask: [num_rows, num_keys] added to the scaled scores, or None; for a row that it hides everything from, out is 0
        and lse means nothing
    Returns out [num_rows, num_heads, head_dim] and lse [num_rows, num_heads].
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    # Rows x query group become the queries of one KV head, so that a grouped-query model reads its keys once too.
    packed = q.view(rows, kv_heads, group, dim).transpose(0, 1).reshape(1, kv_heads, rows * group, dim)
    wide = None if mask is None else mask[None, None].repeat_interleave(group, dim=2)
    out, lse = _flash(packed, k[None], v[None], attn_mask=wide, scale=scale)
    out = out.view(kv_heads, rows, group, dim).transpose(0, 1).reshape(rows, heads, dim)
    lse = lse.view(kv_heads, rows, group).transpose(0, 1).reshape(rows, heads)
    return out, lse


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows are the newest keys: row i sees every key but the last num_rows - 1 - i.

    q: [num_rows, num_heads, head_dim]
    k, v: [num_kv_heads, num_keys, head_dim], num_keys at least num_rows
    mask: [num_rows, num_keys] added besides, or None
    Returns out [num_rows, num_heads, head_dim] and lse [num_rows, num_heads].
    """
    rows, heads, _ = q.shape
    kv_heads, keys, _ = k.shape
    queries = q.transpose(0, 1)[None]
    group = heads // kv_heads
    wide_k = k.repeat_interleave(group, dim=0)[None]
    wide_v = v.repeat_interleave(group, dim=0)[None]
    if keys == rows and mask is None:
        out, lse = _flash(queries, wide_k, wide_v, is_causal=True, scale=scale)
    else:
        seen = torch.full((rows, keys), float("-inf"), dtype=q.dtype).triu_(keys - rows + 1)
        if mask is not None:
            seen = seen + mask
        out, lse = _flash(queries, wide_k, wide_v, attn_mask=seen[None, None], scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def attend_tails(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Each row sees keys of its own, padded to the longest: one call for all rows.

    q: [num_rows, num_heads, head_dim]
    k, v: [num_rows, num_kv_heads, num_keys, head_dim]; padding must be finite
    mask: [num_rows, num_keys] added to the scaled scores: 0 where seen, -inf where not; every row sees at least one
    Returns out [num_rows, num_heads, head_dim] and lse [num_rows, num_heads].
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    packed = q.view(rows, kv_heads, group, dim)
    wide = mask[:, None, None, :].expand(rows, 1, group, mask.shape[1])
    out, lse = _flash(packed, k, v, attn_mask=wide, scale=scale)
    return out.reshape(rows, heads, dim), lse.reshape(rows, heads)


def attend_parts(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over each of several equally long parts, apart: a state for every part and query.

    q: [num_parts, num_kv_heads, num_queries, head_dim]; parts that share their queries are an expanded view
    k, v: [num_parts, num_kv_heads, part_tokens, head_dim], of any strides but the last; all of it finite
    mask: [num_parts, 1 or num_queries, part_tokens] added to the scaled scores, or None; for a query that it hides a
        whole part from, out is 0 and lse means nothing
    Returns out [num_parts, num_kv_heads, num_queries, head_dim] and lse [num_parts, num_kv_heads, num_queries].
    Law: each part is computed as if it were alone; how many parts there are changes no bit.
    """
    parts, _, queries, _ = q.shape
    wide = None if mask is None else mask[:, None].expand(parts, 1, queries, k.shape[2])
    out, lse = _flash(q, k, v, attn_mask=wide, scale=scale)
    return out, lse


def attention_torch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """The definition of the three above: plain masked attention.

    q: [num_rows, num_heads, head_dim]; k, v: [num_kv_heads, num_keys, head_dim]; visible: bool [num_rows, num_keys]
    Returns out [num_rows, num_heads, head_dim] and lse [num_rows, num_heads]; for a row that sees nothing, 0 and -inf.
    """
    group = q.shape[1] // k.shape[0]
    keys = k.repeat_interleave(group, dim=0)
    values = v.repeat_interleave(group, dim=0)
    scores = torch.einsum("rhd,hkd->rhk", q, keys) * scale
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weight = torch.exp(scores - lse.clamp(min=torch.finfo(q.dtype).min)[..., None])
    return torch.einsum("rhk,hkd->rhd", weight, values), lse
