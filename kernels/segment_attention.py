"""Attention over runs of KV slots that several rows see: each run is read once for all of them.

Every function returns partial states (out, lse) that `merge_states` joins; lse is the natural log of the sum of the
exponentials of the scaled scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap

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


# Columns of the task list, in order. One row is one chunk of keys and up to block_m // query_group rows that see it.
TASK_PAGES = 0  # where in `task_pages` the chunk's pages begin
TASK_LENGTH = 1  # the slots it spans: of every page all, but for the last
TASK_SEGMENT = 2  # index into `segment_length` of the segment that still grows, or -1
TASK_FIRST = 3  # where the chunk begins in that segment; below 0 where other keys of its row come first
TASK_ROWS = 4  # where in `task_rows` its rows begin
TASK_NUM_ROWS = 5
TASK_PART = 6  # the partial state of its first row; the others follow
TASK_SHIFT = 7  # added to the positions of the keys, as its rows see them
TASK_FIELDS = 8

# An entry of `task_pages` is page << PAGE_BITS | tokens: a chunk may hold several short segments, and each ends in the
# middle of a page.
PAGE_BITS = 8
MAX_PAGES = 1 << (31 - PAGE_BITS)

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 64, 128)
BLOCK_ROWS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def segment_attention(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
    segment_length: Tensor, *, num_parts: int, scale: float, window: int = 0, block_m: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Decode attention, task by task: a chunk of keys is read once for all the rows of its task.

    q: [num_rows, num_heads, head_dim], normed, not rotated; head_dim contiguous
    positions: [num_rows], int32: where the token of each row stands
    k, v: [num_pages, num_kv_heads, page_size, head_dim], the type of q, any strides but head_dim contiguous; keys
        rotated at the position they were written at
    cos, sin: [num_positions, head_dim / 2], fp32, contiguous: the factors of each position. A row that sees a segment
        under shift s is rotated, in fp32 and then rounded to the keys' type, to its position less s; |position - s| is
        below num_positions
    tasks: [max_tasks, TASK_FIELDS], int32, contiguous; num_tasks: [1], int32: how many of them count
    task_rows: int32, the rows of the tasks; task_pages: int32, their pages, page << PAGE_BITS | tokens that are keys
    page_start: int32, beside task_pages: the position of the first key of each, as it was written
    segment_length: int32: tokens now written of the segments that still grow; masks what is planned ahead
    num_parts: capacity for partial states
    scale: on the scores
    window: a key at p is hidden from a row at q where q - p - shift >= window; 0 hides none
    block_m: rows x query heads a tile: a constant of the configuration, since a row's bits may depend on it
    Returns out [num_parts, num_heads, head_dim] and lse [num_parts, num_heads], fp32, natural log; 0 and -inf where a
    row sees nothing of a chunk; what no task names means nothing.
    The op `anabranch::segment_attention`: Triton on a GPU, `segment_attention_torch` on a CPU.
    Raises ValueError for a head size, page size, dtype or shape that is not supported.
    Source: decode over a shared prefix after Hydragen (Juravsky et al. 2024) and FlashInfer's cascade (Ye et al. 2025),
    with FlashDecoding's split over keys.
    """
    check_inputs(q, positions, k, v, cos, sin, block_m)
    if tasks.dim() != 2 or tasks.shape[1] != TASK_FIELDS:
        raise ValueError(f"tasks are [max_tasks, {TASK_FIELDS}], not {list(tasks.shape)}")
    lists = (num_tasks, task_rows, task_pages, page_start, segment_length)
    if any(x.dtype != torch.int32 or not x.is_contiguous() for x in (positions, tasks, *lists)):
        raise ValueError("positions and the task lists are int32 and contiguous")
    parts: tuple[Tensor, Tensor] = _segment_attention(
        q, positions, k, v, cos, sin, tasks, *lists, num_parts, scale, window, block_m
    )
    return parts


def segment_attention_torch(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
    segment_length: Tensor, num_parts: int, scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `segment_attention`: each task's keys are gathered, and attended to in fp32.

    Row by row, so that here, too, a row's bits do not depend on the others of its task.
    """
    _, num_heads, head_dim = q.shape
    out = q.new_zeros(num_parts, num_heads, head_dim, dtype=torch.float32)
    lse = q.new_full((num_parts, num_heads), float("-inf"), dtype=torch.float32)
    lengths = segment_length.tolist()
    for task in tasks[: int(num_tasks)].tolist():
        pages, length, segment, first, row_first, num_rows, part, shift = task
        if segment >= 0:
            length = max(0, min(length, lengths[segment] - first))
        rows = task_rows[row_first : row_first + num_rows].long()
        keys, values, position, _ = gather_keys(k, v, task_pages, page_start, pages, length)
        angle = positions[rows].long() - shift
        rotated = rotate_queries(q[rows], angle, cos, sin)
        visible = torch.ones(num_rows, len(position), dtype=torch.bool)
        if window:
            visible = angle[:, None] - position[None, :] < window
        for row in range(num_rows):
            one = slice(row, row + 1)
            found = attention_torch(rotated[one], keys, values, visible[one], scale=scale)
            out[part + row], lse[part + row] = found[0][0], found[1][0]
    return out, lse


def gather_keys(
    k: Tensor, v: Tensor, task_pages: Tensor, page_start: Tensor, pages: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The keys of the `length` slots from `task_pages[pages]` on, for the definitions.

    Returns K and V, each fp32 [num_kv_heads, num_keys, head_dim], the positions they were written at, and the index of
    each among the slots.
    """
    page_size = k.shape[2]
    index = torch.arange(length)
    entry = task_pages[pages + index // page_size].long()
    index = index[index % page_size < (entry & ((1 << PAGE_BITS) - 1))]
    at, slot = pages + index // page_size, index % page_size
    page = task_pages[at].long() >> PAGE_BITS
    keys, values = (x[page, :, slot].transpose(0, 1).float() for x in (k, v))
    return keys, values, page_start[at] + slot, index


def rotate_queries(q: Tensor, angle: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows of q [num_rows, num_heads, head_dim] rotated in fp32 to `angle` [num_rows], int64, which may be negative,
    then rounded to q's type, as fp32; for the definitions."""
    low, high = q.float().chunk(2, dim=-1)
    c, s = cos[angle.abs()][:, None], (sin[angle.abs()] * angle.sign()[:, None])[:, None]
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(q.dtype).float()


def supports(block_m: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the widest tile's accumulators stay in registers."""
    return block_m < 128 or (dtype != torch.float32 and head_dim <= 128)


def check_inputs(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, block_m: int) -> None:
    """Raise ValueError if rows, pools or tables are not what `segment_attention` and `segment_prefill` take."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k.shape[1], k.shape[2]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"a head size of {head_dim} is not supported: it is one of {HEAD_DIMS}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"a page of {page_size} tokens is not supported: it is one of {PAGE_SIZES}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v share one type of fp32, fp16 and bf16; they are {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[0] > MAX_PAGES:
        raise ValueError(f"a pool of {k.shape[0]} pages is not supported: page numbers stop at {MAX_PAGES}")
    if k.shape != v.shape or k.shape[3] != head_dim:
        raise ValueError(f"keys of {list(k.shape)} and values of {list(v.shape)} do not go with heads of {head_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if block_m not in BLOCK_ROWS or num_heads // num_kv_heads > block_m:
        raise ValueError(
            f"block_m={block_m} is one of {BLOCK_ROWS} and holds a query group, here of {num_heads // num_kv_heads}"
        )
    if not supports(block_m, head_dim, q.dtype):
        raise ValueError(f"block_m={block_m} is for 16-bit types and heads of up to 128: registers do not hold more")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("q, k and v are contiguous in head_dim")
    if positions.shape != (num_rows,):
        raise ValueError(f"{num_rows} rows have positions of {list(positions.shape)}")
    for table in (cos, sin):
        if table.dtype != torch.float32 or not table.is_contiguous() or table.shape[1:] != (head_dim // 2,):
            raise ValueError(f"cos and sin are fp32, contiguous, [num_positions, {head_dim // 2}]")
    if cos.shape != sin.shape:
        raise ValueError("cos and sin hold the same positions")


# Opaque to tracing, since its loops follow the data.
@torch.library.custom_op("anabranch::segment_attention_cpu", mutates_args=())
def _on_cpu(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
    segment_length: Tensor, num_parts: int, scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return segment_attention_torch(
        q, positions, k, v, cos, sin, tasks, num_tasks, task_rows, task_pages, page_start, segment_length,
        num_parts, scale, window, block_m,
    )  # fmt: skip


@define_op("anabranch::segment_attention")
def _segment_attention(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
    segment_length: Tensor, num_parts: int, scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if takes_torch(q):
        parts: tuple[Tensor, Tensor] = _on_cpu(
            q, positions, k, v, cos, sin, tasks, num_tasks, task_rows, task_pages, page_start, segment_length,
            num_parts, scale, window, block_m,
        )  # fmt: skip
        return parts
    from anabranch.kernels import segment_attention_triton as on_gpu

    out, lse = _parts(q, num_parts)
    on_gpu.launch_segment_attention(
        wrap(on_gpu.segment_attention_kernel),
        q, positions, k, v, cos, sin, tasks, num_tasks, task_rows, task_pages, page_start, segment_length, out, lse,
        scale=scale, window=window, block_m=block_m,
    )  # fmt: skip
    return out, lse


def _parts(q: Tensor, num_parts: int) -> tuple[Tensor, Tensor]:
    out = q.new_empty((num_parts, q.shape[1], q.shape[2]), dtype=torch.float32)
    return out, q.new_empty((num_parts, q.shape[1]), dtype=torch.float32)


def _fake(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
    segment_length: Tensor, num_parts: int, scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _parts(q, num_parts)


_on_cpu.register_fake(_fake)
_segment_attention.register_fake(_fake)
