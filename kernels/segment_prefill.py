"""Prefill attention: many rows of one thread against all that they see, in one pass over the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap
from anabranch.kernels.segment_attention import check_inputs, gather_keys, rotate_queries

# Columns of the block list, in order. A block is consecutive rows of one thread, which write to one open segment.
BLOCK_FIRST_ROW = 0
BLOCK_NUM_ROWS = 1
BLOCK_FIRST_SPAN = 2  # index into the span list; the spans are taken in order
BLOCK_NUM_SPANS = 3
BLOCK_FIELDS = 4

# Columns of the span list, in order. A span is a run of keys that a block's rows see under one shift.
SPAN_PAGES = 0  # where in `task_pages` its pages begin
SPAN_LENGTH = 1  # the slots it spans: of every page all, but for the last
SPAN_SHIFT = 2  # added to the positions of the keys, as the rows see them
SPAN_CAUSAL = 3  # -1, or the index, within the span, of the key that the block's first row writes
SPAN_FIELDS = 4


def segment_prefill(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    *, scale: float, window: int = 0, block_m: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each block of rows over its spans, under one softmax; keys of the rows themselves must be written.

    q: [num_rows, num_heads, head_dim], normed, not rotated; head_dim contiguous
    positions: [num_rows], int32: where the token of each row stands
    k, v: [num_pages, num_kv_heads, page_size, head_dim], the type of q, any strides but head_dim contiguous; keys
        rotated at the position they were written at
    cos, sin: [num_positions, head_dim / 2], fp32, contiguous: the factors of each position, as in `segment_attention`
    blocks: [max_blocks, BLOCK_FIELDS], int32, contiguous; num_blocks: [1], int32: how many of them count. No row is in
        two blocks
    spans: [max_spans, SPAN_FIELDS], int32, contiguous. Under a causal offset of c, row i of the block sees the keys
        whose index in the span is at most c + i; under -1 all rows see all of it
    task_pages: int32, page << PAGE_BITS | tokens that are keys; page_start: int32, beside it: the position of the first
        key of each, as it was written
    scale: on the scores
    window: a key at p is hidden from a row at q where q - p - shift >= window; 0 hides none
    block_m: rows x query heads a tile, 16, 32 or 64: a constant of the configuration, since a row's bits may depend on
        it; None for `largest_block`
    Returns out [num_rows, num_heads, head_dim], q's type, and lse [num_rows, num_heads], fp32, natural log; 0 and -inf
    for a row of a block that sees nothing; a row that no block names means nothing.
    The op `anabranch::segment_prefill`: Triton on a GPU, `segment_prefill_torch` on a CPU.
    Raises ValueError for a head size, page size, dtype or shape that is not supported.
    Law: how rows are cut into blocks changes no bit of a row whose visible spans are the same.
    Source: FlashAttention-2 (Dao 2023) over paged runs of keys.
    """
    largest = largest_block(q.shape[2], q.dtype)
    block_m = largest if block_m is None else block_m
    if block_m > largest:
        raise ValueError(
            f"block_m={block_m} is at most {largest} for heads of {q.shape[2]}: registers do not hold more"
        )
    check_inputs(q, positions, k, v, cos, sin, block_m)
    for name, table, fields in (("blocks", blocks, BLOCK_FIELDS), ("spans", spans, SPAN_FIELDS)):
        if table.dim() != 2 or table.shape[1] != fields:
            raise ValueError(f"{name} are [max_{name}, {fields}], not {list(table.shape)}")
    if cos.numel() >= 2**31:
        raise ValueError(f"a table of {cos.shape[0]} positions is too long: the kernel counts its numbers in 32 bits")
    if num_blocks.shape != (1,):
        raise ValueError(f"num_blocks is [1], not {list(num_blocks.shape)}")
    if task_pages.shape != page_start.shape:
        raise ValueError(f"{list(task_pages.shape)} pages have starts of {list(page_start.shape)}")
    lists = (blocks, num_blocks, spans, task_pages, page_start)
    if any(x.dtype != torch.int32 or not x.is_contiguous() for x in (positions, *lists)):
        raise ValueError("positions and the block lists are int32 and contiguous")
    found: tuple[Tensor, Tensor] = _segment_prefill(q, positions, k, v, cos, sin, *lists, scale, window, block_m)
    return found


def largest_block(head_dim: int, dtype: torch.dtype) -> int:
    """The most rows x query heads that a tile's registers hold on every target."""
    if dtype == torch.float32:
        # Heads of 80 and 96 take as much as those of 128, and the masks of what is missing besides.
        return 64 if head_dim in (64, 128) else 16
    return 64 if head_dim <= 128 else 32


def segment_prefill_torch(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `segment_prefill`: each block's keys are gathered, and attended to in fp32.

    Row by row, so that it keeps the law, too.
    """
    num_rows, num_heads, _ = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((num_rows, num_heads), float("-inf"), dtype=torch.float32)
    group = num_heads // k.shape[1]
    for first_row, count, first_span, num_spans in blocks[: int(num_blocks)].tolist():
        of_block = spans[first_span : first_span + num_spans].tolist()
        gathered = [gather_keys(k, v, task_pages, page_start, pages, length) for pages, length, _, _ in of_block]
        for offset in range(count):
            row = slice(first_row + offset, first_row + offset + 1)
            scores, values = [], []
            for (_, _, shift, causal), (key, value, position, index) in zip(of_block, gathered, strict=True):
                angle = positions[row].long() - shift
                visible = index <= causal + offset if causal >= 0 else torch.ones_like(index, dtype=torch.bool)
                if window:
                    visible &= angle - position < window
                query = rotate_queries(q[row], angle, cos, sin)[0]
                seen = key[:, visible].repeat_interleave(group, dim=0)
                scores.append(torch.einsum("hd,hkd->hk", query, seen) * scale)
                values.append(value[:, visible].repeat_interleave(group, dim=0))
            if not sum(score.shape[1] for score in scores):
                continue
            score = torch.cat(scores, dim=1)
            lse[row] = torch.logsumexp(score, dim=-1)
            out[row] = torch.einsum("hk,hkd->hd", score.softmax(-1), torch.cat(values, dim=1)).to(q.dtype)
    return out, lse


# Opaque to tracing, since its loops follow the data.
@torch.library.custom_op("anabranch::segment_prefill_cpu", mutates_args=())
def _on_cpu(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return segment_prefill_torch(
        q, positions, k, v, cos, sin, blocks, num_blocks, spans, task_pages, page_start, scale, window, block_m
    )


@define_op("anabranch::segment_prefill")
def _segment_prefill(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if takes_torch(q):
        found: tuple[Tensor, Tensor] = _on_cpu(
            q, positions, k, v, cos, sin, blocks, num_blocks, spans, task_pages, page_start, scale, window, block_m
        )
        return found
    from anabranch.kernels import segment_prefill_triton as on_gpu

    out, lse = _states(q)
    on_gpu.launch_segment_prefill(
        wrap(on_gpu.segment_prefill_kernel),
        q, positions, k, v, cos, sin, blocks, num_blocks, spans, task_pages, page_start, out, lse,
        scale=scale, window=window, block_m=block_m,
    )  # fmt: skip
    return out, lse


def _states(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    scale: float, window: int, block_m: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _states(q)


_on_cpu.register_fake(_fake)
_segment_prefill.register_fake(_fake)
