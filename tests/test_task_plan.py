"""The planner's lists against what the views say, computed apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.kernels.merge_states import merge_parts_torch
from anabranch.kernels.segment_attention import PAGE_BITS, TASK_LENGTH, TASK_NUM_ROWS, segment_attention_torch
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.task_plan import Capacity, Overflow, Planned, Row, TaskLists, TaskPlanner

HORIZON = 8


@dataclass
class Thread:
    """A thread as the runtime keeps it: a view of sealed segments, the open one, and where its ancestors stand."""

    view: View | None
    segment: Segment
    forks: tuple[View, ...] = ()

    @property
    def end(self) -> int:
        return self.segment.start + self.segment.length


class Forest:
    """Threads that write, fork and are stitched together over one pool."""

    def __init__(self, page_size: int = 16, num_pages: int = 4000) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.threads: list[Thread] = []
        # Who waits for whom: (the thread's view, where it stands, its branches' numbers in `threads`).
        self.forks: list[tuple[View | None, int, list[Thread]]] = []

    def root(self, tokens: int, pages: list[int] | None = None) -> Thread:
        """A thread with no view; `pages` are aliased, as from the prefix cache."""
        segment = Segment(self.pool, 0, pages=pages or ())
        if pages:
            self.pool.share(pages)
        thread = Thread(None, segment)
        self.write(thread, tokens)
        self.threads.append(thread)
        return thread

    def write(self, thread: Thread, tokens: int) -> None:
        """Append, and hold the pages of the horizon."""
        thread.segment.append([0] * tokens)
        self.reserve(thread.segment, HORIZON)

    def reserve(self, segment: Segment, horizon: int) -> None:
        while len(segment.pages) * self.pool.page_size < segment.length + horizon:
            segment.pages.append(self.pool.allocate())

    def fork(self, thread: Thread, lengths: list[int]) -> list[Thread]:
        """`thread` waits, and a branch of each length takes its place."""
        thread.segment.seal()
        view = View(thread.view, [Entry(thread.segment)])
        branches = []
        for length in lengths:
            branch = Thread(view, Segment(self.pool, thread.end), (*thread.forks, view))
            self.write(branch, length)
            branches.append(branch)
        at = self.threads.index(thread)
        self.threads[at : at + 1] = branches
        self.forks.append((view, thread.end, branches))
        return branches

    def stitch(self, laid_end_to_end: bool) -> bool:
        """The newest fork whose branches all run is joined."""
        for number in reversed(range(len(self.forks))):
            view, end, branches = self.forks[number]
            if all(any(b is t for t in self.threads) for b in branches):
                break
        else:
            return False
        del self.forks[number]
        entries, shift, reach = [], 0, end
        for branch in branches:
            branch.segment.seal()
            gained = [*(branch.view.gained_since(view) if branch.view else []), Entry(branch.segment)]
            entries += [Entry(e.segment, e.shift + shift) for e in gained]
            reach = max(reach, branch.end + shift)
            if laid_end_to_end:
                shift += branch.end - end
        at = self.threads.index(branches[0])
        joined = Thread(View(view, entries), Segment(self.pool, reach), branches[0].forks[:-1])
        self.write(joined, 1)
        self.threads[at : at + len(branches)] = [joined]
        return True

    def rows(self) -> list[Row | None]:
        return [Row(t.view, t.segment, t.forks) for t in self.threads]


def pieces(row: Row) -> list[tuple[Segment, int]]:
    """What a row sees, in order, from the links themselves."""
    links: list[View] = []
    link = row.view
    while link is not None:
        links.append(link)
        link = link.parent
    return [(e.segment, e.shift) for one in reversed(links) for e in one.entries] + [(row.segment, 0)]


def grow(forest: Forest, moves: list[tuple[int, int, int]]) -> None:
    """Moves (what, which thread, how much) as Hypothesis draws them."""
    for what, which, amount in moves:
        thread = forest.threads[which % len(forest.threads)]
        match what:
            case 0:
                forest.write(thread, amount)
            case 1 if len(forest.threads) < 12:
                forest.fork(thread, [1 + (amount * (i + 3)) % 70 for i in range(2 + amount % 4)])
            case _:
                forest.stitch(laid_end_to_end=bool(amount % 2))


MOVES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11), st.integers(1, 90)), max_size=12)
CAPACITY = Capacity.for_rows(16, tasks=512, pages=4096)


def planner(rows_per_task: int, chunk: int = 32, page_size: int = 16, capacity: Capacity = CAPACITY) -> TaskPlanner:
    return TaskPlanner(page_size=page_size, rows_per_task=rows_per_task, capacity=capacity, chunk_tokens=chunk)


def check(
    rows: list[Row | None], lists: TaskLists, planned: Planned, rows_per_task: int, chunk: int, size: int
) -> None:
    """The lists say of every row, in view order, exactly the slots, shifts and positions that its view says, and where
    its open segment's are in that; and each token of a segment is read once for each group of rows that see it."""
    parts: dict[int, tuple[int, list[tuple[int, int, int, int]]]] = {}
    assert int(lists.num_tasks[0]) == planned.tasks
    tasks = lists.tasks[: planned.tasks].tolist()
    assert [t[1] for t in tasks] == sorted((t[1] for t in tasks), reverse=True)
    read: Counter[int] = Counter()
    for pages, length, segment, first, row_first, num_rows, part, shift in tasks:
        assert 1 <= num_rows <= rows_per_task and 1 <= length <= chunk
        assert row_first + num_rows <= planned.task_rows and pages + -(-length // size) <= planned.pages
        keys = []
        for index in range(length):
            number, tokens = divmod(int(lists.task_pages[pages + index // size]), 2**PAGE_BITS)
            if index % size < tokens:
                at = int(lists.page_start[pages + index // size]) + index % size
                # The device compares this with how much of the open segment is written; sealed keys come before it.
                token = max(-1, first + index) if segment >= 0 else -1
                keys.append((number * size + index % size, shift, at, token))
        read.update(slot for slot, *_ in keys)
        for offset in range(num_rows):
            row = int(lists.task_rows[row_first + offset])
            assert segment in (-1, row)
            assert part + offset not in parts
            parts[part + offset] = (row, keys)
    assert sorted(parts) == list(range(planned.parts))
    expected: dict[int, set[int]] = {}
    for number, row in enumerate(rows):
        of_row = lists.row_parts[lists.row_parts_indptr[number] : lists.row_parts_indptr[number + 1]].tolist()
        if row is None:
            assert not of_row
            continue
        seen = [parts[part] for part in of_row]
        assert {s[0] for s in seen} == {number}
        found = [key for _, keys in seen for key in keys]
        wanted = []
        for segment, shift in pieces(row):
            length = segment.length if segment.sealed else len(segment.pages) * size
            for i in range(length):
                token = i if segment is row.segment else -1
                wanted.append((segment.slot(i), shift, segment.start + i, token))
                expected.setdefault(segment.slot(i), set()).add(number)
        assert found == wanted
    assert read == {slot: -(-len(rows) // rows_per_task) for slot, rows in expected.items()}


def chunks(lists: TaskLists, planned: Planned, number: int) -> list[tuple[list[int], int, int, int]]:
    """The chunks of row `number` in the order of its merge: (pages, slots, where the open segment begins, shift)."""
    by_part = {}
    for pages, length, _, first, _, num_rows, part, shift in lists.tasks[: planned.tasks].tolist():
        of_chunk = lists.task_pages[pages : pages + -(-length // 16)].tolist()
        by_part.update((part + offset, (of_chunk, length, first, shift)) for offset in range(num_rows))
    bounds = lists.row_parts_indptr[number : number + 2]
    return [by_part[part] for part in lists.row_parts[bounds[0] : bounds[1]].tolist()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(moves=MOVES, rows_per_task=st.integers(1, 5))
def test_tasks_are_what_the_views_say(moves: list[tuple[int, int, int]], rows_per_task: int) -> None:
    """For any tree of forks and joins each row's tasks are its view, and a key is read once a group of rows."""
    forest = Forest()
    forest.root(40)
    forest.root(3)
    grow(forest, moves)
    rows = forest.rows()
    rows.insert(1, None)
    lists = TaskLists(CAPACITY)
    planned = planner(rows_per_task).plan(rows, HORIZON, lists)
    assert isinstance(planned, Planned)
    check(rows, lists, planned, rows_per_task, 32, 16)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(first=MOVES, then=MOVES)
def test_a_planner_that_has_planned_before_says_the_same(
    first: list[tuple[int, int, int]], then: list[tuple[int, int, int]]
) -> None:
    """Planning again after any moves is right, whatever was laid out before, with a layout that often fills up; and
    every row is cut as by a planner that sees that row for the first time, and alone."""
    forest = Forest()
    forest.root(70)
    tight = Capacity(16, 512, 1024, 160, 2048, 40)
    used = planner(2, capacity=tight)
    for move in [*first, *then]:
        grow(forest, [move])
        lists, alone = TaskLists(tight), TaskLists(tight)
        rows = forest.rows()
        planned = used.plan(rows, HORIZON, lists)
        if not isinstance(planned, Planned):
            assert isinstance(planner(2, capacity=tight).plan(rows, HORIZON, lists), Overflow)
            continue
        check(rows, lists, planned, 2, 32, 16)
        for number, row in enumerate(rows):
            one = planner(2, capacity=tight).plan([row], HORIZON, alone)
            assert isinstance(one, Planned)
            assert chunks(lists, planned, number) == chunks(alone, one, 0)


def test_a_join_of_short_branches_is_few_tasks() -> None:
    """Short segments that are stitched together share chunks with one another, with what comes before them and with
    the open segment; where each is seen under a shift of its own, none does."""
    for laid_end_to_end, expected in ((False, 3), (True, 1 + 8 + 1)):
        forest = Forest()
        root = forest.root(16)
        forest.fork(root, [20] * 9)
        forest.stitch(laid_end_to_end)
        rows = forest.rows()
        lists = TaskLists(CAPACITY)
        planned = planner(4, chunk=128).plan(rows, HORIZON, lists)
        assert isinstance(planned, Planned)
        check(rows, lists, planned, 4, 128, 16)
        # Of one page the root, of two each branch, of one the open segment: chunks have eight. End to end the root and
        # the first branch have no shift, and the open segment none.
        assert planned.tasks == expected


def test_a_long_chain_is_few_tasks() -> None:
    """Many links, of forks that are over, are one run that is cut at whole chunks, also when it grows link by link and
    when branches of a further fork see it."""
    forest = Forest()
    forest.root(10)
    made = planner(4, chunk=128)
    lists = TaskLists(CAPACITY)
    laid_out = 8
    for rounds in range(1, 20):
        forest.fork(forest.threads[0], [5])
        forest.stitch(laid_end_to_end=False)
        planned = made.plan(forest.rows(), HORIZON, lists)
        assert isinstance(planned, Planned)
        check(forest.rows(), lists, planned, 4, 128, 16)
        # The root's page, two links a round, of a page each, and the open segment.
        assert planned == Planned(-(-(2 * rounds + 1) // 8), 1, planned.pages, -(-(2 * rounds + 1) // 8))
        # Chunks that are full stay where they are: a round lays out its own, and one with the open segment.
        assert planned.pages <= laid_out + 16
        laid_out = planned.pages
    forest.fork(forest.threads[0], [1] * 8)
    planned = made.plan(forest.rows(), HORIZON, lists)
    assert isinstance(planned, Planned)
    check(forest.rows(), lists, planned, 4, 128, 16)
    assert (planned.task_rows, planned.parts) == (8 + 8, 8 * 5 + 8)


def test_a_cached_root_is_cut_as_one_that_is_not() -> None:
    """Where a row's keys are cut doesn't depend on how many of its first pages came from the prefix cache, also after
    the rest is sealed."""
    found = []
    for cached in (0, 1, 2, 5):
        forest = Forest()
        first = forest.root(90)
        pages = first.segment.pages[:cached]
        # The same tokens, in the same pages as far as they are cached; the rest in a segment of the thread's own.
        view = None
        if cached:
            segment = Segment(forest.pool, 0, pages=pages)
            forest.pool.share(pages)
            segment.append([0] * 16 * cached)
            segment.seal()
            view = View(None, [Entry(segment)])
        forest.threads = [Thread(view, Segment(forest.pool, 16 * cached))]
        forest.write(forest.threads[0], 90 - 16 * cached)
        made, lists = planner(4), TaskLists(CAPACITY)
        lengths = []
        for _ in range(2):
            planned = made.plan(forest.rows(), HORIZON, lists)
            assert isinstance(planned, Planned)
            check(forest.rows(), lists, planned, 4, 32, 16)
            lengths += [sum(page % 2**PAGE_BITS for page in of_chunk) for of_chunk, *_ in chunks(lists, planned, 0)]
            forest.fork(forest.threads[0], [3])
        found.append(lengths)
    assert all(lengths == found[0] for lengths in found)


def test_a_fork_must_be_on_the_way() -> None:
    """A row that names a view which it doesn't see as its ancestor's is refused."""
    forest = Forest()
    forest.fork(forest.root(10), [1])
    forest.fork(forest.root(10), [1])
    (_, segment, _), (_, _, forks) = (row for row in forest.rows() if row)
    view = forest.rows()[0].view  # type: ignore[union-attr]
    made = planner(1)
    assert isinstance(made.plan(forest.rows(), HORIZON, TaskLists(CAPACITY)), Planned)
    for row in (Row(None, segment, forks), Row(view, segment, forks), Row(forks[0], segment, (view,))):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no link"):
            made.plan([row], HORIZON, TaskLists(CAPACITY))


def test_roots_share_cached_pages() -> None:
    """Two runs whose roots hold the same cached pages read them once; the rest of each root is read for itself."""
    forest = Forest()
    first = forest.root(70)
    second = forest.root(90, pages=first.segment.pages[:4])
    for root in (first, second):
        forest.fork(root, [1, 1])
    lists = TaskLists(CAPACITY)
    rows = forest.rows()
    planned = planner(4).plan(rows, HORIZON, lists)
    assert isinstance(planned, Planned)
    check(rows, lists, planned, 4, 32, 16)
    assert int((lists.tasks[: planned.tasks, TASK_NUM_ROWS] == 4).sum()) == 2


@pytest.mark.parametrize("lengths", [[64, 64, 5], [70, 64, 70], [10, 64], [32]])
def test_a_root_of_several_segments(lengths: list[int]) -> None:
    """A root link may hold several segments, of which the first fills chunks that other roots could share."""
    forest = Forest()
    segments = []
    for length in lengths:
        segments.append(Segment(forest.pool, sum(lengths)))
        segments[-1].append([0] * length)
        segments[-1].seal()
    forest.threads = [Thread(View(None, [Entry(segment) for segment in segments]), Segment(forest.pool, 0))]
    forest.write(forest.threads[0], 3)
    made, lists = planner(4), TaskLists(CAPACITY)
    for _ in range(2):
        planned = made.plan(forest.rows(), HORIZON, lists)
        assert isinstance(planned, Planned)
        check(forest.rows(), lists, planned, 4, 32, 16)
        forest.fork(forest.threads[0], [1, 1])


def test_pages_that_moved_are_noticed() -> None:
    """An open segment whose pages became others, as after a swap, is planned with those."""
    forest = Forest()
    thread = forest.root(20)
    made = planner(1)
    lists = TaskLists(CAPACITY)
    made.plan(forest.rows(), HORIZON, lists)
    thread.segment.pages = [forest.pool.allocate(), forest.pool.allocate()]
    planned = made.plan(forest.rows(), HORIZON, lists)
    assert isinstance(planned, Planned)
    check(forest.rows(), lists, planned, 1, 32, 16)


def test_overflow_names_what_is_short() -> None:
    """A wave that does not fit says which list is short, and its halves fit."""
    forest = Forest()
    forest.fork(forest.root(64), [1] * 8)
    rows = forest.rows()
    room = {"rows": 8, "tasks": 16, "task_rows": 24, "pages": 20, "parts": 32, "chunks": 12}
    for what, capacity in (("rows", 7), ("tasks", 11), ("task_rows", 23), ("pages", 4), ("parts", 23), ("chunks", 9)):
        short = Capacity(**{**room, what: capacity})
        made = planner(4, capacity=short)
        found = made.plan(rows, HORIZON, TaskLists(short))
        assert isinstance(found, Overflow) and found.capacity == capacity and found.needed > capacity
        assert found.what == what
        if what not in ("pages", "chunks"):
            for half in (rows[:4], rows[4:]):
                assert isinstance(made.plan(half, HORIZON, TaskLists(short)), Planned)


def test_bad_sizes_are_refused() -> None:
    """A chunk that is no whole number of pages, a tile without rows and an open segment without pages are refused."""
    with pytest.raises(ValueError, match="whole number of pages"):
        planner(1, chunk=40)
    with pytest.raises(ValueError, match="rows_per_task"):
        planner(0)
    forest = Forest()
    forest.root(10)
    with pytest.raises(ValueError, match="too few for 100 more"):
        planner(1).plan(forest.rows(), 100, TaskLists(CAPACITY))


def test_no_rows_is_a_plan() -> None:
    """A wave of idle lanes has no tasks, and every lane no parts, also where there were some before."""
    forest = Forest()
    forest.root(10)
    made, lists = planner(1), TaskLists(CAPACITY)
    made.plan(forest.rows(), HORIZON, lists)
    assert made.plan([None, None], HORIZON, lists) == Planned(0, 0, 0, 0)
    assert lists.num_tasks[0] == 0 and not lists.row_parts_indptr.any()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(moves=MOVES)
def test_attention_by_tasks_is_attention_by_views(moves: list[tuple[int, int, int]]) -> None:
    """The ops' definitions over the lists give each row attention over its view, its own segment up to its length."""
    forest = Forest(num_pages=400)
    forest.root(40)
    grow(forest, moves)
    rows = [row for row in forest.rows() if row is not None]
    lists = TaskLists(CAPACITY)
    planned = planner(2).plan(rows, HORIZON, lists)
    assert isinstance(planned, Planned)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.full((400, 1, 16, 64), float("nan")) for _ in "kv")
    for row in rows:
        for segment, _ in pieces(row):
            for i in range(segment.length):
                slot = segment.slot(i)
                for pool in (k, v):
                    pool[slot // 16, 0, slot % 16] = torch.randn(64, generator=generator)
    q = torch.randn(len(rows), 1, 64, generator=generator)
    # No rotation: what is tested is which keys are seen. Shifts and positions are compared exactly above.
    table = torch.ones(4000, 32), torch.zeros(4000, 32)
    lengths = torch.tensor([row.segment.length for row in rows], dtype=torch.int32)
    positions = torch.tensor([row.segment.start + row.segment.length - 1 for row in rows], dtype=torch.int32)
    tensors = (
        torch.from_numpy(x) for x in (lists.tasks, lists.num_tasks, lists.task_rows, lists.task_pages, lists.page_start)
    )
    out, lse = segment_attention_torch(q, positions, k, v, *table, *tensors, lengths, planned.parts, 0.2, 0, 16)
    indptr, parts = (torch.from_numpy(x) for x in (lists.row_parts_indptr, lists.row_parts))
    merged, _ = merge_parts_torch(out, lse, indptr[: len(rows) + 1], parts, torch.float32)
    for number, row in enumerate(rows):
        slots = torch.tensor([s.slot(i) for s, _ in pieces(row) for i in range(s.length)])
        keys, values = (x[slots // 16, 0, slots % 16] for x in (k, v))
        expected = (keys @ q[number, 0] * 0.2).softmax(0) @ values
        torch.testing.assert_close(merged[number, 0], expected, rtol=0, atol=5e-6)


def test_partials_are_a_quarter_of_the_keys_at_most() -> None:
    """At 8k tokens x 16 rows of 32/8 heads, partial states written and read are at most 25% of K and V."""
    forest = Forest()
    forest.fork(forest.root(8192), [64] * 16)
    capacity = Capacity.for_rows(16)
    made = TaskPlanner(page_size=16, rows_per_task=16, capacity=capacity)
    lists = TaskLists(capacity)
    planned = made.plan(forest.rows(), HORIZON, lists)
    assert isinstance(planned, Planned)
    kv_bytes = int(np.sum(lists.tasks[: planned.tasks, TASK_LENGTH])) * 8 * 2 * 128 * 2
    part_bytes = planned.parts * 32 * (128 + 1) * 4 * 2
    assert kv_bytes >= (8192 + 16 * 64) * 8 * 2 * 128 * 2
    assert part_bytes <= kv_bytes / 4
