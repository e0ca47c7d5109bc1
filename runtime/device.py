"""What a step needs on a device: the page store, rotary factors, task lists and attention over any blocks of rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON
from anabranch.kernels.merge_states import merge_parts
from anabranch.kernels.norms import MAX_SIZE
from anabranch.kernels.rope_append import rope_append
from anabranch.kernels.sample_device import MAX_VOCAB
from anabranch.kernels.segment_attention import (
    BLOCK_ROWS,
    DTYPES,
    HEAD_DIMS,
    MAX_PAGES,
    PAGE_BITS,
    PAGE_SIZES,
    TASK_FIRST,
    TASK_LENGTH,
    TASK_NUM_ROWS,
    TASK_PAGES,
    TASK_ROWS,
    TASK_SEGMENT,
    TASK_SHIFT,
    segment_attention,
    supports,
)
from anabranch.kernels.segment_prefill import segment_prefill
from anabranch.runtime.attention import Block
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.device_forward import CallbackForward, DeviceForward, HeadNorms
from anabranch.runtime.drawing import upload
from anabranch.runtime.fixed_shapes import not_deterministic
from anabranch.runtime.model import Decoder, DecoderLike
from anabranch.runtime.pages import PagePool, Saved, Segment
from anabranch.runtime.rope import rope_table
from anabranch.runtime.task_plan import CHUNK_TOKENS, Capacity, Overflow, Planned, Row, TaskLists, TaskPlanner

Ints = npt.NDArray[np.int32]
Reads = list[list[tuple[int, int, int]]]
"""For each row the (first slot, how many, shift) of every run of keys that it attends to."""

PARTS_BYTES = 1 << 30
"""Most memory for partial states of one layer; it is taken once, and held."""
STAGES = 3
"""Sets of staging buffers: one is filled while the copies of the others may still be under way."""


class PagedStore:
    """The keys and values behind the pool's slots.

    k[layer], v[layer]: [num_pages, num_kv_heads, page_size, head_dim]
    """

    def __init__(
        self,
        pool: PagePool,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (pool.num_pages, num_kv_heads, pool.page_size, head_dim)
        size = 2 * num_layers * math.prod(shape) * dtype.itemsize
        try:
            self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
            self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one
            raise ValueError(
                f"a pool of {pool.num_pages} pages takes {size / 2**30:.1f} GiB, more than {device} has left"
            ) from error
        self._page_size = pool.page_size

    @classmethod
    def over(cls, k: list[Tensor], v: list[Tensor]) -> PagedStore:
        """A store in memory of the caller's: k[layer], v[layer] as above."""
        store = cls.__new__(cls)
        store.k, store.v, store._page_size = k, v, k[0].shape[2]
        return store

    def save(self, segment: Segment) -> Saved:
        """A copy of what `segment` holds, in host memory."""
        page, slot = self._places(segment)
        return [
            (k[page, :, slot].transpose(0, 1).cpu(), v[page, :, slot].transpose(0, 1).cpu())
            for k, v in zip(self.k, self.v, strict=True)
        ]

    def restore(self, segment: Segment, saved: Saved) -> None:
        """Write what `save` gave to the slots that `segment` has now."""
        page, slot = self._places(segment)
        for k, v, (saved_k, saved_v) in zip(self.k, self.v, saved, strict=True):
            k[page, :, slot] = saved_k.transpose(0, 1).to(k.device)
            v[page, :, slot] = saved_v.transpose(0, 1).to(v.device)

    def _places(self, segment: Segment) -> tuple[Tensor, Tensor]:
        device = self.k[0].device
        slots = torch.cat([torch.arange(first, stop) for first, stop in segment.runs()]).to(device)
        return slots // self._page_size, slots % self._page_size


class DeviceLists:
    """A plan's lists on the device, and the staging buffers they come from. Layouts are those of `TaskLists`."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._stages = [self._stage(capacity) for _ in range(STAGES)]
        self._copied: list[torch.cuda.Event | None] = [None] * STAGES
        self._next = 0
        self.staged = self._stages[0]
        self.planned = Planned(0, 0, 0, 0)
        empty = TaskLists(capacity)
        self.tasks, self.num_tasks, self.task_rows, self.task_pages, self.page_start, self.indptr, self.row_parts = (
            torch.zeros(x.shape, dtype=torch.int32, device=device)
            for x in (
                empty.tasks,
                empty.num_tasks,
                empty.task_rows,
                empty.task_pages,
                empty.page_start,
                empty.row_parts_indptr,
                empty.row_parts,
            )
        )

    def plan(self, planner: TaskPlanner, rows: Sequence[Row | None]) -> Planned | Overflow:
        """Plan `rows` and start the copies; after an overflow the lists are as before."""
        stage = self._stages[self._next]
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        planned = planner.plan(rows, 0, stage)
        if isinstance(planned, Overflow):
            return planned
        for into, of, count in (
            (self.tasks, stage.tasks, planned.tasks),
            (self.num_tasks, stage.num_tasks, 1),
            (self.task_rows, stage.task_rows, planned.task_rows),
            (self.task_pages, stage.task_pages, planned.pages),
            (self.page_start, stage.page_start, planned.pages),
            (self.indptr, stage.row_parts_indptr, len(stage.row_parts_indptr)),
            (self.row_parts, stage.row_parts, planned.parts),
        ):
            if count:
                into[:count].copy_(torch.from_numpy(of[:count]), non_blocking=True)
        if self._pinned:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._next] = event
        self._next = (self._next + 1) % STAGES
        self.staged, self.planned = stage, planned
        return planned

    def _stage(self, capacity: Capacity) -> TaskLists:
        lists = TaskLists(capacity)
        if self._pinned:
            # Copies from pageable memory would wait for what the device has to do.
            for name in TaskLists.__slots__:
                pinned = torch.zeros(getattr(lists, name).shape, dtype=torch.int32, pin_memory=True)
                setattr(lists, name, pinned.numpy())
        return lists


class Device:
    """The device side of an engine.

    lanes, chunk: most decoding rows and most prefilled rows of a step
    store: the pools, where the caller made them
    deterministic: fixed tiles and linears, so that a row's bits do not depend on the rows beside it
    Raises ValueError for a decoder, page size or device that the kernels do not support, naming the limit, and
    PlanError `not-deterministic` for one that does not run by the kernels' linears.
    """

    def __init__(
        self,
        decoder: DecoderLike,
        pool: PagePool,
        *,
        lanes: int,
        chunk: int,
        deterministic: bool,
        store: PagedStore | None = None,
    ) -> None:
        config = decoder.config
        self.device = decoder.device
        group = config.num_heads // config.num_kv_heads
        check_supported(decoder, pool.page_size)
        if not 1 <= pool.num_pages <= MAX_PAGES:
            raise ValueError(f"a pool of {pool.num_pages} pages is not supported: it has from 1 to {MAX_PAGES}")
        self.config = config
        self.deterministic = deterministic
        self.page_size = pool.page_size
        self.scale = config.head_dim**-0.5
        self.forward: DeviceForward | CallbackForward
        if isinstance(decoder, Decoder):
            self.forward = DeviceForward(decoder, fixed=deterministic)
        else:
            if deterministic:
                raise not_deterministic("the linears of a decoder of its own kind are not known to keep a row's bits")
            self.forward = CallbackForward(decoder)
        self.store = store or PagedStore(
            pool, config.num_layers, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device
        )
        self.cos, self.sin = rotary_factors(config, decoder.device)
        self.windows = windows(config)
        self.block_m = _block_m(lanes * group, group, config.head_dim, decoder.dtype, deterministic)
        self.capacity = _capacity(config, pool, lanes, chunk, self.device)
        self.planner = self._planner(self.capacity)
        self._lists = DeviceLists(self.capacity, self.device)

    def forget(self) -> None:
        """Segments and views that were planned are gone, and their numbers may come again."""
        self.planner = self._planner(self.capacity)

    def step(self, blocks: Sequence[Block]) -> StepOnDevice:
        """Attention over the rows of `blocks`, whose slots the segments hold already."""
        return StepOnDevice(self, blocks)

    def append(
        self, number: int, norms: HeadNorms, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor
    ) -> Tensor:
        """Write keys and values of one layer; returns the queries, normed where the model does that."""
        return rope_append(
            q,
            k,
            v,
            positions,
            slots,
            self.cos,
            self.sin,
            self.store.k[number],
            self.store.v[number],
            q_norm=norms.q_norm,
            k_norm=norms.k_norm,
            eps=self.config.rms_norm_eps,
        )

    def attend(
        self, number: int, q: Tensor, positions: Tensor, lists: DeviceLists, lengths: Tensor, num_parts: int
    ) -> Tensor:
        """Decode attention of one layer. lengths: int32, tokens of each row's open segment."""
        out, lse = segment_attention(
            q,
            positions,
            self.store.k[number],
            self.store.v[number],
            self.cos,
            self.sin,
            lists.tasks,
            lists.num_tasks,
            lists.task_rows,
            lists.task_pages,
            lists.page_start,
            lengths,
            num_parts=num_parts,
            scale=self.scale,
            window=self.windows[number],
            block_m=self.block_m,
        )
        merged, _ = merge_parts(out, lse, lists.indptr[: q.shape[0] + 1], lists.row_parts, q.dtype)
        return merged

    def lists_for(self, rows: Sequence[Row]) -> list[tuple[slice, DeviceLists]]:
        """The plans of decoding rows: one, or as many as it takes for each to fit."""
        if not rows:
            return []
        if len(rows) <= self.capacity.rows and isinstance(self._lists.plan(self.planner, rows), Planned):
            return [(slice(0, len(rows)), self._lists)]
        found: list[tuple[slice, DeviceLists]] = []
        self._split(rows, 0, found)
        return found

    def _split(self, rows: Sequence[Row], first: int, found: list[tuple[slice, DeviceLists]]) -> None:
        capacity = self.capacity if len(rows) > 1 else _capacity_of(rows[0], self.page_size)
        lists = DeviceLists(capacity, self.device)
        planned = lists.plan(self._planner(capacity), rows) if len(rows) <= capacity.rows else None
        if isinstance(planned, Planned):
            found.append((slice(first, first + len(rows)), lists))
            return
        if len(rows) == 1:
            raise RuntimeError(f"one row does not fit lists made for it: {planned}")
        half = len(rows) // 2
        self._split(rows[:half], first, found)
        self._split(rows[half:], first + half, found)

    def _planner(self, capacity: Capacity) -> TaskPlanner:
        group = self.config.num_heads // self.config.num_kv_heads
        return TaskPlanner(page_size=self.page_size, rows_per_task=self.block_m // group, capacity=capacity)


class StepOnDevice:
    """One step's rows, planned: `logits` runs them through the layers.

    Blocks of one row decode: they share reads by tasks. Longer ones are prefilled, each against its own view. The two
    kernels add in different orders, so under `deterministic` it is a token's origin that chooses: what was sampled
    decodes, also when it is fed again, and what was written is prefilled, also when it comes alone.
    """

    def __init__(self, device: Device, blocks: Sequence[Block]) -> None:
        self._device = device
        size = device.page_size
        decoding: list[tuple[int, Block]] = []
        prefilled: list[tuple[int, Block]] = []
        for first_row, block in numbered(blocks):
            for part, decodes in _parts(block, by_origin=device.deterministic):
                (decoding if decodes else prefilled).append((first_row + part.first - block.first, part))
        self._slots, self._positions = places(blocks, device.device)
        self.num_rows = len(self._slots)
        self._decoding = [row for row, _ in decoding]
        self._lengths = [block.first + 1 for _, block in decoding]
        self._groups = device.lists_for(decode_rows([block for _, block in decoding]))
        self._prefill = PrefillLists(prefilled, size, device.device) if prefilled else None
        self._index = upload(torch.tensor(self._decoding, dtype=torch.int64), device.device)
        self._row_lengths = upload(torch.tensor(self._lengths, dtype=torch.int32), device.device)

    def logits(self, tokens: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """fp32 [len(wanted), num_logits] of the rows `wanted`."""
        device = self._device.device
        ids = upload(torch.tensor(tokens, dtype=torch.int64), device)
        rows = upload(torch.tensor(wanted, dtype=torch.int64), device)
        return self._device.forward(ids, self._positions, self._attend, rows)

    def reads(self) -> Reads:
        """What each row reads, from the lists that the kernels are given."""
        found: Reads = [[] for _ in range(self.num_rows)]
        for part, lists in self._groups:
            rows = self._decoding[part]
            for row, runs in zip(rows, runs_read(lists, self._lengths[part], self._device.page_size), strict=True):
                found[row] = runs
        if self._prefill is not None:
            self._prefill.reads(found, self._device.page_size)
        return found

    def _attend(self, number: int, norms: HeadNorms, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        device = self._device
        q = device.append(number, norms, q, k, v, self._positions, self._slots)
        out = torch.empty_like(q)
        if self._prefill is not None:
            plan = self._prefill
            out, _ = segment_prefill(
                q,
                self._positions,
                device.store.k[number],
                device.store.v[number],
                device.cos,
                device.sin,
                plan.blocks,
                plan.num_blocks,
                plan.spans,
                plan.task_pages,
                plan.page_start,
                scale=device.scale,
                window=device.windows[number],
            )
        for part, lists in self._groups:
            index = self._index[part]
            found = device.attend(
                number,
                q.index_select(0, index),
                self._positions.index_select(0, index),
                lists,
                self._row_lengths[part].contiguous(),
                max(1, lists.planned.parts),
            )
            out.index_copy_(0, index, found)
        return out


def numbered(blocks: Sequence[Block]) -> Iterator[tuple[int, Block]]:
    """Each block with the number of its first row."""
    count = 0
    for block in blocks:
        yield count, block
        count += block.count


def places(blocks: Sequence[Block], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the rows of blocks are written and stand: slots, int64, and positions, int32, each [num_rows]."""
    rows = [(block.segment, block.first + offset) for block in blocks for offset in range(block.count)]
    slots = [segment.slot(index) for segment, index in rows]
    positions = [segment.start + index for segment, index in rows]
    return (
        upload(torch.tensor(slots, dtype=torch.int64), device),
        upload(torch.tensor(positions, dtype=torch.int32), device),
    )


class PrefillLists:
    """The blocks and spans of `segment_prefill`. A span is what stands side by side in a view under one shift.

    rows: the blocks, each with the number of its first row
    """

    def __init__(self, rows: Sequence[tuple[int, Block]], page_size: int, device: torch.device) -> None:
        blocks: list[tuple[int, int, int, int]] = []
        spans: list[tuple[int, int, int, int]] = []
        pages: list[Ints] = []
        starts: list[Ints] = []
        num_pages = 0
        for first_row, block in rows:
            first_span = len(spans)
            entries = [] if block.view is None else [e for link in block.view.chain() for e in link.entries]
            seen = [(e.segment, e.segment.length, e.shift) for e in entries]
            seen.append((block.segment, block.first + block.count, 0))
            for shift, together in groupby(seen, key=lambda one: one[2]):
                first = num_pages
                for segment, tokens, _ in together:
                    own = (num_pages - first) * page_size
                    num_pages += _add_pages(segment, tokens, page_size, pages, starts)
                # All pages but the last are spanned whole.
                spans.append((first, (num_pages - first) * page_size - -tokens % page_size, shift, -1))
            # The open segment comes last, in one span with what stands before it: where keys are cut into tiles must
            # not depend on how much of a prompt came from the cache.
            spans[-1] = (*spans[-1][:3], own + block.first)
            blocks.append((first_row, block.count, first_span, len(spans) - first_span))
        self._blocks, self._spans = blocks, spans
        self._pages = np.concatenate(pages)
        self.blocks, self.spans, self.num_blocks = (
            upload(torch.tensor(x, dtype=torch.int32), device) for x in (blocks, spans, [len(blocks)])
        )
        self.task_pages, self.page_start = (
            upload(torch.from_numpy(np.concatenate(x)), device) for x in (pages, starts)
        )

    def reads(self, found: Reads, page_size: int) -> None:
        """Fill in the rows of these blocks."""
        for first_row, num_rows, first_span, num_spans in self._blocks:
            for first, length, shift, causal in self._spans[first_span : first_span + num_spans]:
                for offset in range(num_rows):
                    left = length if causal < 0 else causal + offset + 1
                    found[first_row + offset].extend(_runs(self._pages, first, left, shift, page_size))


def _parts(block: Block, *, by_origin: bool) -> Iterator[tuple[Block, bool]]:
    """The rows of a block that go together, and whether they decode, one by one."""
    if not by_origin:
        yield block, block.count == 1
        return
    first = 0
    sampled = block.segment.sampled[block.first : block.first + block.count]
    while first < block.count:
        stop = first + 1
        while not sampled[first] and stop < block.count and not sampled[stop]:
            stop += 1
        yield replace(block, first=block.first + first, count=stop - first), bool(sampled[first])
        first = stop


def decode_rows(blocks: Sequence[Block]) -> list[Row]:
    """A row for each block of one. Rows of one open segment see it to different lengths, and must not share it."""
    numbers = Counter(block.segment.number for block in blocks)
    rows = []
    for block in blocks:
        segment = block.segment
        if numbers[segment.number] > 1:
            segment = copy(segment)
            segment.number = next(_ALIASES)
        rows.append(Row(block.view, segment, block.forks))
    return rows


_ALIASES = itertools.count(-1, -1)
"""Numbers that no segment of a pool has."""


def runs_read(lists: DeviceLists, lengths: Sequence[int], page_size: int) -> Reads:
    """What each row of a plan reads. lengths: tokens of each row's open segment."""
    stage, planned = lists.staged, lists.planned
    found: Reads = [[] for _ in lengths]
    for task in stage.tasks[: planned.tasks].tolist():
        length = task[TASK_LENGTH]
        if task[TASK_SEGMENT] >= 0:
            length = max(0, min(length, lengths[task[TASK_SEGMENT]] - task[TASK_FIRST]))
        runs = list(_runs(stage.task_pages, task[TASK_PAGES], length, task[TASK_SHIFT], page_size))
        for row in stage.task_rows[task[TASK_ROWS] : task[TASK_ROWS] + task[TASK_NUM_ROWS]].tolist():
            found[row].extend(runs)
    return found


def _runs(pages: Ints, first: int, length: int, shift: int, page_size: int) -> Iterator[tuple[int, int, int]]:
    """The runs of slots that `length` slots from page entry `first` on hold keys in."""
    begin = stop = -1
    for number in range(-(-length // page_size)):
        entry = int(pages[first + number])
        count = min(entry & ((1 << PAGE_BITS) - 1), length - number * page_size)
        slot = (entry >> PAGE_BITS) * page_size
        if count <= 0:
            continue
        if slot == stop:
            stop += count
            continue
        if stop > begin:
            yield begin, stop - begin, shift
        begin, stop = slot, slot + count
    if stop > begin:
        yield begin, stop - begin, shift


def _add_pages(segment: Segment, tokens: int, page_size: int, pages: list[Ints], starts: list[Ints]) -> int:
    """Add the pages of a segment's first `tokens`; returns how many."""
    count = -(-tokens // page_size)
    numbers = np.asarray(segment.pages[:count], dtype=np.int32) << PAGE_BITS | page_size
    numbers[-1] -= -tokens % page_size
    pages.append(numbers)
    starts.append(np.arange(segment.start, segment.start + tokens, page_size, dtype=np.int32))
    return count


def _capacity_of(row: Row, page_size: int) -> Capacity:
    """Room for one row, however long its view."""
    chain = [] if row.view is None else row.view.chain()
    entries = [entry for link in chain for entry in link.entries]
    pages = sum(-(-entry.segment.length // page_size) for entry in entries) + len(row.segment.pages)
    # A chunk holds at least a page, and room for the open segment's last chunk is laid out whole.
    most = pages + len(entries) + 2
    return Capacity(1, most, most, 2 * pages + (1 << 16), most, most)


def rotary_factors(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position as the kernels take them, each fp32 [max_context, head_dim / 2]."""
    positions = torch.arange(config.max_context, dtype=torch.int64, device=device)
    cos, sin = rope_table(config.rope, config.head_dim, positions, torch.float32)
    half = config.head_dim // 2
    # The first half of `sin` is negated there.
    return cos[:, :half].contiguous(), sin[:, half:].contiguous()


def windows(config: ModelConfig) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none."""
    return tuple(w or 0 for w in config.sliding_window) or (0,) * config.num_layers


def _capacity(config: ModelConfig, pool: PagePool, lanes: int, chunk: int, device: torch.device) -> Capacity:
    """Room for a wave of `lanes`, whose contexts may fill the pool. What does not fit runs as a step of its own."""
    chunk_pages = CHUNK_TOKENS // pool.page_size
    # An eighth of a chunk a lane and run is empty on average, and what was planned before stays a while.
    pages = min(1 << 22, 2 * pool.num_pages + 4 * lanes * chunk_pages)
    chunks = pages // chunk_pages + 64 * lanes
    # Each task of the wave makes as many partial states as it has rows, all of which take memory for good.
    state_bytes = 4 * config.num_heads * (config.head_dim + 1)
    parts = max(
        4 * lanes, min(256 * lanes, (PARTS_BYTES if device.type == "cuda" else PARTS_BYTES >> 4) // state_bytes)
    )
    tasks = min(max(256, 128 * lanes, chunks), 1 << 20)
    return Capacity(rows=lanes + chunk, tasks=tasks, task_rows=8 * tasks, pages=pages, parts=parts, chunks=chunks)


def _block_m(rows: int, group: int, head_dim: int, dtype: torch.dtype, deterministic: bool) -> int:
    """The decode tile, which must hold a query group: no larger than the rows need, or a constant."""
    fitting = [m for m in BLOCK_ROWS if m >= group and supports(m, head_dim, dtype)]
    return next((m for m in fitting if m >= (32 if deterministic else rows)), fitting[-1])


def check_supported(decoder: DecoderLike, page_size: int) -> None:
    """Raise ValueError for a decoder or page size that the kernels do not support, naming the limit."""
    config = decoder.config
    group = config.num_heads // config.num_kv_heads
    if decoder.device.type not in ("cpu", "cuda"):
        raise ValueError(f"a device of type `{decoder.device.type}` is not supported: it is cpu or cuda")
    if config.head_dim not in HEAD_DIMS:
        raise ValueError(f"a head size of {config.head_dim} is not supported: it is one of {HEAD_DIMS}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"a page of {page_size} tokens is not supported: it is one of {PAGE_SIZES}")
    if decoder.dtype not in DTYPES:
        raise ValueError(f"{decoder.dtype} is not supported on a device: it is one of {DTYPES}")
    most = max(m for m in BLOCK_ROWS if supports(m, config.head_dim, decoder.dtype))
    if group > most:
        raise ValueError(f"{group} query heads a KV head are not supported: at most {most}")
    for what, number, limit in (
        ("tokens in the vocabulary", decoder.num_logits, MAX_VOCAB),
        ("numbers in a row", config.hidden_size, MAX_SIZE),
        ("numbers in the table of positions", config.max_context * config.head_dim // 2, 2**31 - 1),
    ):
        if number > limit:
            raise ValueError(f"{number} {what} are not supported: at most {limit}")
    if decoder.device.type == "cuda" and not HAS_TRITON:
        raise ValueError("a GPU needs Triton: pip install 'anabranch[gpu]'")
