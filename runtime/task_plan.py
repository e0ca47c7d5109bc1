"""From the views of a wave to the flat task and row lists that `segment_attention` and `merge_parts` run over.

A *run* is what the same rows always see together. A row's view is cut where its ancestors stand: the view that each
handed to a fork that is still open is where all the branches of that fork start, so what lies between two such cuts is
seen as a whole or not at all. What lies behind the last cut nobody else sees; it is one run with the row's open
segment. The pages of a run follow one another, whatever segments they belong to, and are cut into chunks of a constant
number of pages, and where the shift changes: so many short segments, side by side or one after another, are not as many
partial states. A row's split points thus depend on its own view and ancestors alone, and not on how its first tokens
came from the prefix cache; balance comes from the order of the tasks, longest first. Runs and chunks are laid out once,
when they are first seen; a plan then is a few sorts and sums over (row, run) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from anabranch.kernels.segment_attention import (
    MAX_PAGES,
    PAGE_BITS,
    TASK_FIELDS,
    TASK_LENGTH,
    TASK_NUM_ROWS,
    TASK_PAGES,
    TASK_PART,
    TASK_ROWS,
    TASK_SEGMENT,
    TASK_SHIFT,
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
    """One lane of the wave.

    view: its sealed segments; segment: the open one that its tokens go to
    forks: where its ancestors stand, outermost first: of each fork that it is a branch of, from the last `fresh` one
        on, the view that was handed to the branches; links of `view`. Rows share what they see up to a common one.
    """

    view: View | None
    segment: Segment
    forks: tuple[View, ...] = ()


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
        no_pages = np.zeros(0, dtype=np.int32)
        self._nothing = _Piece((), np.zeros((0, TASK_FIELDS), dtype=np.int32), no_pages, no_pages, 0)
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
            if own is None or own.row.view is not row.view or own.row.forks != row.forks:
                own = self._open[segment.number] = self._lay_out_open(row)
            elif own.pages != segment.pages:
                own = self._open[segment.number] = self._grow(own, row)
            found.append(own.runs)
        return found

    def _lay_out_open(self, row: Row) -> _Open:
        """The runs of a row: those it shares, and its own."""
        shared = self._shared(row.forks)
        piece = self._piece(row.forks[-1] if row.forks else None, row.view)
        if piece.shift:
            # The open segment is seen as it is.
            piece = self._closed(piece)
        pages = row.segment.pages
        tail = len(piece.pages)
        count = -(-(tail + len(pages)) // self._chunk_pages)
        # Room for whole chunks: the pages that the segment comes to hold go in where it is.
        page = self._store(piece.pages, piece.starts, count * self._chunk_pages)
        run = self._take(len(piece.chunks) + count)
        chunk = int(self._run_first[run])
        if len(piece.chunks):
            self._chunks[chunk : chunk + len(piece.chunks)] = piece.chunks
        # 16 bits: a wider number among them would widen all, and the sort would not be by radix.
        runs = np.concatenate((shared, np.asarray((*piece.runs, run), dtype=np.int16)))
        own = _Open(row, list(pages), tail, page, chunk + len(piece.chunks), count, runs)
        self._put(own)
        return own

    def _grow(self, old: _Open, row: Row) -> _Open:
        """The open segment has other pages."""
        pages = row.segment.pages
        if -(-(old.tail + len(pages)) // self._chunk_pages) != old.num_chunks:
            return self._lay_out_open(row)
        own = old._replace(pages=list(pages))
        self._put(own)
        return own

    def _put(self, own: _Open) -> None:
        """Write the pages and chunks of an open segment to where it is laid out."""
        size, num_pages = self.page_size, len(own.pages)
        begin, end = own.page + own.tail, own.page + own.tail + num_pages
        self._pages[begin:end] = self._addresses(own.pages)
        start = own.row.segment.start
        self._page_start[begin:end] = np.arange(start, start + num_pages * size, size)
        for number in range(own.num_chunks):
            page = own.page + number * self._chunk_pages
            # A segment whose first chunk begins with sealed keys begins before itself.
            self._chunks[own.chunk + number] = (
                page, min(self.chunk_tokens, (end - page) * size), 0, (page - begin) * size, 0, 0, 0, 0,
            )  # fmt: skip

    def _shared(self, forks: tuple[View, ...]) -> Runs:
        """The runs from the root to the last of `forks`, which all the branches of that fork see."""
        known = self._chains.get(forks)
        if known is None:
            found: list[int] = []
            for below, view in pairwise((None, *forks)):
                piece = self._piece(below, view)
                found += piece.runs
                run = self._sealed.get((below, view))
                if run is None and (len(piece.chunks) or len(piece.pages)):
                    chunks = self._closed(piece).chunks
                    run = self._sealed[below, view] = self._take(len(chunks))
                    first = int(self._run_first[run])
                    self._chunks[first : first + len(chunks)] = chunks
                if run is not None:
                    found.append(run)
            if len(self._chains) > 4 * self.capacity.rows:
                self._chains.clear()
            known = self._chains[forks] = np.asarray(found, dtype=np.int16)
        return known

    def _piece(self, below: View | None, view: View | None) -> _Piece:
        """What `view` sees beyond `below`, cut into chunks. What is known of a link on the way is gone on from."""
        piece = self._nothing
        links: list[View] = []
        link = view
        while link is not below:
            if link is None:
                raise ValueError("a fork is no link of its row's view")
            known = self._pieces.get((below, link))
            if known is not None:
                piece = known
                break
            links.append(link)
            link = link.parent
        if not links:
            return piece
        if link is None:
            piece = self._root(links.pop())
        piece = self._append(piece, (entry for one in reversed(links) for entry in one.entries))
        self._pieces[below, view] = piece
        return piece

    def _root(self, link: View) -> _Piece:
        """The piece of a root link. Roots may begin with the same cached pages: a full chunk of the same pages at the
        same positions is one run, for all of them."""
        if not link.entries:
            return self._nothing
        segment, shift = link.entries[0].segment, link.entries[0].shift
        whole = segment.length // self.chunk_tokens
        runs = []
        for begin in range(0, whole * self._chunk_pages, self._chunk_pages):
            pages = segment.pages[begin : begin + self._chunk_pages]
            start = segment.start + begin * self.page_size
            key = (start, shift, tuple(pages))
            run = self._roots.get(key)
            if run is None:
                run = self._roots[key] = self._take(1)
                starts = np.arange(start, start + self.chunk_tokens, self.page_size, dtype=np.int32)
                page = self._store(self._addresses(pages), starts)
                self._chunks[self._run_first[run]] = (page, self.chunk_tokens, -1, 0, 0, 0, 0, shift)
            runs.append(run)
        return self._append(self._nothing._replace(runs=tuple(runs)), link.entries, whole * self._chunk_pages)

    def _append(self, piece: _Piece, entries: Iterable[Entry], skipped: int = 0) -> _Piece:
        """`piece`, and `entries` after it, but for the first `skipped` pages of the first."""
        size = self.page_size
        for shift, group in groupby(entries, key=lambda entry: entry.shift):
            if piece.shift != shift:
                piece = self._closed(piece)._replace(shift=shift)
            pages: list[int] = []
            starts: list[int] = []
            ends: list[int] = []
            missing: list[int] = []
            for entry in group:
                segment = entry.segment
                count = -(-segment.length // size)
                first, skipped = skipped, 0
                if first == count:
                    continue
                pages += segment.pages[first:count]
                starts += range(segment.start + first * size, segment.start + count * size, size)
                ends.append(len(pages) - 1)
                missing.append(-segment.length % size)
            addresses = self._addresses(pages)
            addresses[ends] -= np.asarray(missing, dtype=np.int32)
            piece = piece._replace(
                pages=np.concatenate((piece.pages, addresses)),
                starts=np.concatenate((piece.starts, np.asarray(starts, dtype=np.int32))),
            )
            piece = self._lay_out(piece, len(piece.pages) - len(piece.pages) % self._chunk_pages)
        return piece

    def _closed(self, piece: _Piece) -> _Piece:
        """`piece` with its last chunk laid out, full or not."""
        return self._lay_out(piece, len(piece.pages))

    def _lay_out(self, piece: _Piece, num_pages: int) -> _Piece:
        """`piece` with its first `num_pages` open pages laid out."""
        if not num_pages:
            return piece
        pages = piece.pages[:num_pages]
        at = self._store(pages, piece.starts[:num_pages])
        first = np.arange(0, num_pages, self._chunk_pages)
        stop = np.minimum(first + self._chunk_pages, num_pages)
        chunks = np.zeros((len(first), TASK_FIELDS), dtype=np.int32)
        chunks[:, TASK_PAGES] = at + first
        chunks[:, TASK_LENGTH] = (stop - first - 1) * self.page_size + (pages[stop - 1] & _PAGE_TOKENS)
        chunks[:, TASK_SEGMENT] = -1
        chunks[:, TASK_SHIFT] = piece.shift
        return piece._replace(
            chunks=np.concatenate((piece.chunks, chunks)),
            pages=piece.pages[num_pages:],
            starts=piece.starts[num_pages:],
        )

    def _addresses(self, pages: Sequence[int]) -> Ints:
        """Full pages as `task_pages` has them."""
        found = np.asarray(pages, dtype=np.int32)
        if len(found) and int(found.max()) >= MAX_PAGES:
            raise ValueError(f"page numbers stop at {MAX_PAGES}")
        return found << PAGE_BITS | self.page_size

    def _store(self, pages: Ints, starts: Ints, room: int = 0) -> int:
        """Lay out `pages`, and leave room for `room` in all; returns where they are."""
        at = self._num_pages
        end = at + max(room, len(pages))
        if end > self.capacity.pages:
            raise _FullError(Overflow("pages", end, self.capacity.pages))
        self._num_pages = end
        self._pages[at : at + len(pages)] = pages
        self._page_start[at : at + len(pages)] = starts
        return at

    def _take(self, num_chunks: int) -> int:
        """A new run, of chunks that the caller writes from `_run_first` on."""
        run, chunk = self._num_runs, self._num_chunks
        for what, needed, capacity in (
            ("chunks", chunk + num_chunks, self.capacity.chunks),
            ("runs", run + 1, self._max_runs),
        ):
            if needed > capacity:
                raise _FullError(Overflow(what, needed, capacity))
        self._num_runs, self._num_chunks = run + 1, chunk + num_chunks
        self._run_first[run] = chunk
        self._run_chunks[run] = num_chunks
        return run

    def _forget(self) -> None:
        self._num_runs = self._num_chunks = self._num_pages = 0
        # Views are equal to themselves alone, and stay what they are.
        self._pieces: dict[tuple[View | None, View | None], _Piece] = {}
        self._sealed: dict[tuple[View | None, View | None], int] = {}
        self._chains: dict[tuple[View, ...], Runs] = {}
        self._roots: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self._open: dict[int, _Open] = {}


class _Piece(NamedTuple):
    """What is seen between two cuts.

    runs: of the full chunks at a root, which come first
    chunks: those that are laid out, as tasks without rows
    pages, starts: of the last chunk, which is not: entries of `task_pages` and `page_start`
    shift: of those
    """

    runs: tuple[int, ...]
    chunks: Ints
    pages: Ints
    starts: Ints
    shift: int


class _Open(NamedTuple):
    """What is laid out for the open segment of a row.

    pages: of the segment; tail: sealed pages before them
    page, chunk: where the tail and the chunks that are not sealed begin; num_chunks: how many these are
    runs: all that the row sees
    """

    row: Row
    pages: list[int]
    tail: int
    page: int
    chunk: int
    num_chunks: int
    runs: Runs


class _FullError(Exception):
    def __init__(self, overflow: Overflow) -> None:
        super().__init__(overflow.what)
        self.overflow = overflow


_PAGE_TOKENS = (1 << PAGE_BITS) - 1
_NO_RUNS: Runs = np.zeros(0, dtype=np.int16)
_TRUE = np.ones(1, dtype=np.bool_)
_ZERO = np.zeros(1, dtype=np.int64)
