"""From the views of a wave to the flat task and row lists that `segment_attention` and `merge_parts` run over.

A *run* is what the same rows always see together: the entries of one link of the view chain, or the open segment of one
row. Its keys are cut into chunks: each segment at multiples of a constant number of tokens, and what is left of
neighbours under one shift goes together while it fits, so that a join of many short branches is not as many partial
states. A row's split points thus depend on its own view alone; balance comes from the order of the tasks, longest
first. Runs and chunks are laid out once, when they are first seen; a plan then is a few sorts and sums over (row, run)
pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from anabranch.kernels.segment_attention import (
    MAX_PAGES,
    PAGE_BITS,
    TASK_FIELDS,
    TASK_LENGTH,
    TASK_NUM_ROWS,
    TASK_PART,
    TASK_ROWS,
    TASK_SEGMENT,
)
from anabranch.runtime.pages import Entry, Segment, View

# By counted bytes (benchmarks/bytes.py): at 8k x 16 rows of 32/8 heads, partial states are 13% of the bytes of K and V;
# chunks of 512 make it 25%. Not measured on a GPU.
CHUNK_TOKENS = 1024

# Runs are numbered in 16 bits: numpy sorts those by radix.
MAX_RUNS = 2**15 - 1

Ints: TypeAlias = npt.NDArray[np.int32]
Runs: TypeAlias = npt.NDArray[np.int16]


class Row(NamedTuple):
    """One lane of the wave. view: its sealed segments; segment: the open one that its tokens go to."""

    view: View | None
    segment: Segment


@dataclass(frozen=True, slots=True)
class Capacity:
    """Entries of the lists that go to the device. A part also takes num_heads x (head_dim + 1) fp32 numbers there."""

    rows: int
    tasks: int
    task_rows: int
    pages: int
    parts: int
    chunks: int

    @classmethod
    def for_rows(cls, rows: int, *, tasks: int = 8192, pages: int = 65536, parts: int = 16384) -> Capacity:
        """Room for `rows` rows, with eight of them a task on average, and for what was planned before."""
        return cls(rows, tasks, 8 * tasks, pages, parts, 2 * tasks)


class TaskLists:
    """Staging buffers of a plan, each int32 and of a fixed capacity. Layouts are those of `segment_attention`.

    tasks: [tasks, TASK_FIELDS]; num_tasks: [1]; task_rows: [task_rows]; task_pages, page_start: [pages]
    row_parts_indptr: [rows + 1]; row_parts: [parts]
    TASK_SEGMENT is the row whose open segment it is, so `segment_length` is a length a row.
    """

    __slots__ = ("num_tasks", "page_start", "row_parts", "row_parts_indptr", "task_pages", "task_rows", "tasks")

    def __init__(self, capacity: Capacity) -> None:
        self.tasks: Ints = np.zeros((capacity.tasks, TASK_FIELDS), dtype=np.int32)
        self.num_tasks: Ints = np.zeros(1, dtype=np.int32)
        self.task_rows: Ints = np.zeros(capacity.task_rows, dtype=np.int32)
        self.task_pages: Ints = np.zeros(capacity.pages, dtype=np.int32)
        self.page_start: Ints = np.zeros(capacity.pages, dtype=np.int32)
        self.row_parts_indptr: Ints = np.zeros(capacity.rows + 1, dtype=np.int32)
        self.row_parts: Ints = np.zeros(capacity.parts, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Planned:
    """How much of each list a plan filled."""

    tasks: int
    task_rows: int
    pages: int
    parts: int


@dataclass(frozen=True, slots=True)
class Overflow:
    """The wave does not fit: `needed` entries of `what`, of `capacity`. Split its rows, or run it eagerly.

    Where laying out stopped early, `needed` is a lower bound.
    """

    what: str
    needed: int
    capacity: int


class TaskPlanner:
    """Plans waves over one page pool.

    page_size: tokens a page
    rows_per_task: rows that one task may hold: block_m // query_group of the kernel; more rows that see a chunk make
        more tasks, each of which reads it
    chunk_tokens: a whole number of pages
    Raises ValueError if a size is out of range.
    """

    def __init__(
        self, *, page_size: int, rows_per_task: int, capacity: Capacity, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        if rows_per_task < 1:
            raise ValueError(f"rows_per_task={rows_per_task} is at least 1")
        if chunk_tokens < page_size or chunk_tokens % page_size or chunk_tokens > MAX_RUNS:
            raise ValueError(f"chunk_tokens={chunk_tokens} is a whole number of pages of {page_size}, up to {MAX_RUNS}")
        self.page_size = page_size
        self.chunk_tokens = chunk_tokens
        self.capacity = capacity
        self._rows_per_task = rows_per_task
        self._chunk_pages = chunk_tokens // page_size
        # A chunk is a task that has no rows yet.
        self._chunks: Ints = np.zeros((capacity.chunks, TASK_FIELDS), dtype=np.int32)
        self._pages: Ints = np.zeros(capacity.pages, dtype=np.int32)
        self._page_start: Ints = np.zeros(capacity.pages, dtype=np.int32)
        self._max_runs = min(MAX_RUNS, capacity.chunks)
        self._run_first = np.zeros(self._max_runs, dtype=np.int64)
        self._run_chunks = np.zeros(self._max_runs, dtype=np.int64)
        self._num_runs = self._num_chunks = self._num_pages = 0
        self._forget()

    def plan(self, rows: Sequence[Row | None], horizon: int, into: TaskLists) -> Planned | Overflow:
        """Fill `into` for `rows`, good while each writes up to `horizon` more tokens to its open segment.

        rows: by lane; None for a lane that does nothing, which gets no parts
        Every open segment must already hold the pages for its horizon; those it holds beyond are planned for, too.
        Plan again when a row's view or segment changes, or a segment has run through its horizon.
        Returns how much was filled, or what does not fit; `into` then means nothing.
        Raises ValueError if an open segment lacks pages.
        """
        if len(rows) > self.capacity.rows:
            return Overflow("rows", len(rows), self.capacity.rows)
        try:
            seen = self._seen(rows, horizon)
        except _FullError:
            # What is laid out is mostly of segments that are gone.
            self._forget()
            try:
                seen = self._seen(rows, horizon)
            except _FullError as full:
                return full.overflow
        return self._fill(rows, seen, into)

    def _fill(self, rows: Sequence[Row | None], seen: list[Runs], into: TaskLists) -> Planned | Overflow:
        limit = self.capacity
        per_row = np.fromiter(map(len, seen), dtype=np.int64, count=len(seen))
        into.row_parts_indptr[:] = 0
        pairs = int(per_row.sum())
        if not pairs:
            into.num_tasks[0] = 0
            return Planned(0, 0, 0, 0)
        if pairs > limit.task_rows:
            return Overflow("task_rows", pairs, limit.task_rows)
        runs = np.concatenate(seen)
        # Stable: the rows of a run stay in order.
        order = np.argsort(runs, kind="stable")
        by_run = runs[order]
        begin = np.flatnonzero(np.concatenate((_TRUE, by_run[1:] != by_run[:-1])))
        used = by_run[begin]
        readers = np.diff(begin, append=pairs)
        chunks = self._run_chunks[used]
        groups = -(-readers // self._rows_per_task)
        run_tasks = chunks * groups
        run_parts = chunks * readers
        num_tasks, num_parts = int(run_tasks.sum()), int(run_parts.sum())
        if num_tasks > limit.tasks:
            return Overflow("tasks", num_tasks, limit.tasks)
        if num_parts > limit.parts:
            return Overflow("parts", num_parts, limit.parts)
        first_part = np.cumsum(run_parts) - run_parts

        which = np.repeat(np.arange(len(used)), run_tasks)
        local = np.arange(num_tasks) - (np.cumsum(run_tasks) - run_tasks)[which]
        width = groups[which]
        chunk = local // width
        skipped = (local - chunk * width) * self._rows_per_task
        of_run = readers[which]
        rows_of = np.repeat(np.arange(len(rows)), per_row)[order]
        tasks = self._chunks[self._run_first[used][which] + chunk]
        tasks[:, TASK_ROWS] = begin[which] + skipped
        tasks[:, TASK_NUM_ROWS] = np.minimum(self._rows_per_task, of_run - skipped)
        tasks[:, TASK_PART] = first_part[which] + chunk * of_run + skipped
        # An open segment is seen by one row, which is who knows its length.
        tasks[:, TASK_SEGMENT] = np.where(tasks[:, TASK_SEGMENT] >= 0, rows_of[tasks[:, TASK_ROWS]], -1)
        longest_first = np.argsort((-tasks[:, TASK_LENGTH]).astype(np.int16), kind="stable")
        np.take(tasks, longest_first, axis=0, out=into.tasks[:num_tasks])
        into.num_tasks[0] = num_tasks
        into.task_rows[:pairs] = rows_of
        into.task_pages[: self._num_pages] = self._pages[: self._num_pages]
        into.page_start[: self._num_pages] = self._page_start[: self._num_pages]

        run_of = np.repeat(np.arange(len(used)), readers)
        part = np.empty(pairs, dtype=np.int64)
        step = np.empty(pairs, dtype=np.int64)
        count = np.empty(pairs, dtype=np.int64)
        part[order] = first_part[run_of] + np.arange(pairs) - begin[run_of]
        step[order] = readers[run_of]
        count[order] = chunks[run_of]
        ends = np.cumsum(count)
        if num_parts == pairs:
            into.row_parts[:num_parts] = part
        else:
            pair = np.repeat(np.arange(pairs), count)
            into.row_parts[:num_parts] = part[pair] + (np.arange(num_parts) - (ends - count)[pair]) * step[pair]
        last = np.cumsum(per_row)
        into.row_parts_indptr[1 : len(rows) + 1] = np.concatenate((_ZERO, ends))[last]
        into.row_parts_indptr[len(rows) + 1 :] = num_parts
        return Planned(num_tasks, pairs, self._num_pages, num_parts)

    def _seen(self, rows: Sequence[Row | None], horizon: int) -> list[Runs]:
        """For each row the runs that it sees, in view order."""
        if len(self._open) > 4 * self.capacity.rows:
            self._open.clear()
        found = []
        for row in rows:
            if row is None:
                found.append(_NO_RUNS)
                continue
            segment = row.segment
            if segment.length + horizon > len(segment.pages) * self.page_size:
                raise ValueError(
                    f"an open segment of {segment.length} tokens holds {len(segment.pages)} pages of {self.page_size}: "
                    f"too few for {horizon} more"
                )
            own = self._open.get(segment.number)
            if own is None or own.view is not row.view or own.pages != segment.pages:
                own = self._lay_out_open(row, own)
            found.append(own.runs)
        return found

    def _lay_out_open(self, row: Row, old: _Open | None) -> _Open:
        segment = row.segment
        tokens = len(segment.pages) * self.page_size
        count = -(-tokens // self.chunk_tokens)
        if old is not None and old.slots.num_chunks == count:
            slots = old.slots
        else:
            # Room for whole chunks: the pages that the segment comes to hold go in where it is.
            slots = self._take(count, count * self._chunk_pages)
        self._put(slots.page, segment, 0, tokens)
        for number in range(count):
            first = number * self.chunk_tokens
            self._chunks[slots.chunk + number] = (
                slots.page + number * self._chunk_pages, min(self.chunk_tokens, tokens - first), 0, first, 0, 0, 0, 0,
            )  # fmt: skip
        runs = np.append(self._chain(row.view), np.int16(slots.run))
        own = self._open[segment.number] = _Open(row.view, list(segment.pages), slots, runs)
        return own

    def _chain(self, view: View | None) -> Runs:
        """The runs of the links from the root to `view`."""
        if view is None:
            return _NO_RUNS
        known = self._chains.get(id(view))
        if known is not None:
            return known[1]
        links: list[View] = []
        link: View | None = view
        before = _NO_RUNS
        while link is not None:
            known = self._chains.get(id(link))
            if known is not None:
                before = known[1]
                break
            links.append(link)
            link = link.parent
        added = [run for one in reversed(links) for run in self._link(one)]
        runs = np.concatenate((before, np.asarray(added, dtype=np.int16)))
        if len(self._chains) > 4 * self.capacity.rows:
            self._chains.clear()
        self._chains[id(view)] = (view, runs)
        return runs

    def _link(self, link: View) -> tuple[int, ...]:
        """The runs of one link: one, but at the root one a chunk.

        Roots may hold the same cached pages: full chunks of the same pages at the same positions are one run.
        """
        known = self._links.get(id(link))
        if known is not None:
            return known[1]
        chunks = list(self._cut(link.entries))
        if link.parent is None:
            found = tuple(self._root_run(chunk) for chunk in chunks)
        else:
            found = (self._lay_out(chunks),) if chunks else ()
        self._links[id(link)] = (link, found)
        return found

    def _cut(self, entries: Sequence[Entry]) -> Iterator[_Chunk]:
        """The chunks of a link, in order: those that one segment fills, and between them what is left of neighbours."""
        pieces: list[_Piece] = []
        shift = room = 0
        for entry in entries:
            segment = entry.segment
            whole = segment.length - segment.length % self.chunk_tokens
            left = segment.length - whole
            num_pages = -(-left // self.page_size)
            if pieces and (whole or entry.shift != shift or num_pages > room):
                yield _Chunk(shift, pieces)
                pieces = []
            shift = entry.shift
            for first in range(0, whole, self.chunk_tokens):
                yield _Chunk(shift, [_Piece(segment, first, self.chunk_tokens)])
            if left:
                room = (room if pieces else self._chunk_pages) - num_pages
                pieces.append(_Piece(segment, whole, left))
        if pieces:
            yield _Chunk(shift, pieces)

    def _root_run(self, chunk: _Chunk) -> int:
        segment, first, tokens = chunk.pieces[0]
        if tokens < self.chunk_tokens:
            return self._lay_out([chunk])
        page = first // self.page_size
        key = (segment.start + first, chunk.shift, tuple(segment.pages[page : page + self._chunk_pages]))
        run = self._shared.get(key)
        if run is None:
            run = self._shared[key] = self._lay_out([chunk])
        return run

    def _lay_out(self, chunks: Sequence[_Chunk]) -> int:
        """A new run of sealed keys."""
        size = self.page_size
        slots = self._take(len(chunks), sum(-(-piece.tokens // size) for chunk in chunks for piece in chunk.pieces))
        page = slots.page
        for number, (shift, pieces) in enumerate(chunks, slots.chunk):
            begin = page
            for segment, first, tokens in pieces:
                page = self._put(page, segment, first, tokens)
            length = (page - begin) * size - -pieces[-1].tokens % size
            self._chunks[number] = (begin, length, -1, 0, 0, 0, 0, shift)
        return slots.run

    def _put(self, page: int, segment: Segment, first: int, tokens: int) -> int:
        """Write the pages of a piece from `page` on; returns where they end."""
        size = self.page_size
        pages = np.asarray(segment.pages[first // size : -(-(first + tokens) // size)], dtype=np.int32)
        if len(pages) and int(pages.max()) >= MAX_PAGES:
            raise ValueError(f"page numbers stop at {MAX_PAGES}")
        end = page + len(pages)
        self._pages[page:end] = pages << PAGE_BITS | size
        self._pages[end - 1] -= -tokens % size
        self._page_start[page:end] = np.arange(segment.start + first, segment.start + first + tokens, size)
        return end

    def _take(self, num_chunks: int, num_pages: int) -> _Slots:
        run, chunk, page = self._num_runs, self._num_chunks, self._num_pages
        for what, needed, capacity in (
            ("chunks", chunk + num_chunks, self.capacity.chunks),
            ("pages", page + num_pages, self.capacity.pages),
            ("runs", run + 1, self._max_runs),
        ):
            if needed > capacity:
                raise _FullError(Overflow(what, needed, capacity))
        self._num_runs, self._num_chunks, self._num_pages = run + 1, chunk + num_chunks, page + num_pages
        self._run_first[run] = chunk
        self._run_chunks[run] = num_chunks
        return _Slots(run, chunk, num_chunks, page)

    def _forget(self) -> None:
        self._num_runs = self._num_chunks = self._num_pages = 0
        # By identity; what is known is held, so that an identity is not given to another view.
        self._links: dict[int, tuple[View, tuple[int, ...]]] = {}
        self._chains: dict[int, tuple[View, Runs]] = {}
        self._shared: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self._open: dict[int, _Open] = {}


class _Piece(NamedTuple):
    segment: Segment
    first: int
    tokens: int


class _Chunk(NamedTuple):
    """The pieces of one chunk, seen under one shift."""

    shift: int
    pieces: list[_Piece]


class _Slots(NamedTuple):
    """Where a run is laid out. num_chunks: of `chunk` on."""

    run: int
    chunk: int
    num_chunks: int
    page: int


class _Open(NamedTuple):
    """The open segment of a row, as laid out. runs: of the view, then its own."""

    view: View | None
    pages: list[int]
    slots: _Slots
    runs: Runs


class _FullError(Exception):
    def __init__(self, overflow: Overflow) -> None:
        super().__init__(overflow.what)
        self.overflow = overflow


_NO_RUNS: Runs = np.zeros(0, dtype=np.int16)
_TRUE = np.ones(1, dtype=np.bool_)
_ZERO = np.zeros(1, dtype=np.int64)
