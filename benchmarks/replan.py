"""Host time of planning a wave again after a finish, a fork, a join and a horizon.

    python benchmarks/replan.py [--repeats 40]

64 lanes see 1,000 segments. A finish seals and drops a lane's segment, gives its pages back and plans again; a fork
seals the parent's segment, makes a view and 32 segments with pages for the horizon, and plans again; a join seals those
32, stitches them into the parent's view and plans again, with the parent in one lane; a horizon gives every lane the
pages for 64 more tokens, and plans again. All fill the staging buffers; the copy to a device and the launch are not
there. Three shapes: `joins`, where lanes are branches of eight forks, each over a stitched join of some 100 segments,
which are over one that all see; `loops`, where each lane has 14 links of its own over one such join; and `chain`, where
all lanes are branches of a fork at the end of 936 links of one segment.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.task_plan import Capacity, Planned, Row, TaskLists, TaskPlanner

LANES = 64
FORK = 32
SEGMENTS = 1000
HORIZON = 64
PAGE_SIZE = 16
SEGMENT_TOKENS = 40
ROWS_PER_TASK = 16
CAPACITY = Capacity.for_rows(LANES, parts=65536)


class Wave:
    """The lanes, their pool and their planner."""

    def __init__(self) -> None:
        self.pool = PagePool(65536, PAGE_SIZE)
        self.planner = TaskPlanner(page_size=PAGE_SIZE, rows_per_task=ROWS_PER_TASK, capacity=CAPACITY)
        self.lists = TaskLists(CAPACITY)
        self.rows: list[Row | None] = [None] * LANES

    def link(self, parent: View | None, segments: int) -> View:
        """A view of `segments` more sealed segments."""
        entries = []
        for _ in range(segments):
            segment = Segment(self.pool, 0)
            segment.append([0] * SEGMENT_TOKENS)
            segment.seal()
            entries.append(Entry(segment))
        return View(parent, entries)

    def start(self, lanes: Sequence[int], view: View, forks: tuple[View, ...]) -> None:
        """Each lane gets an open segment of one token, and the pages for its horizon."""
        for lane in lanes:
            segment = Segment(self.pool, view.total_tokens)
            segment.append([0])
            self.rows[lane] = Row(view.hold(), segment, forks)
            self.reserve(segment)

    def reserve(self, segment: Segment) -> None:
        """Pages for the horizon."""
        while len(segment.pages) * PAGE_SIZE < segment.length + HORIZON:
            segment.pages.append(self.pool.allocate(segment.pages[-1]))

    def finish(self, lane: int) -> None:
        """The lane's thread ends, and is joined by nobody."""
        row = self.rows[lane]
        if row is None or row.view is None:
            raise ValueError(f"lane {lane} is idle")
        row.segment.seal()
        row.segment.drop()
        row.view.drop()
        self.rows[lane] = None

    def fork(self, parent: int, lanes: Sequence[int]) -> None:
        """The parent's thread waits; branches take its lane and others."""
        row = self.rows[parent]
        if row is None:
            raise ValueError(f"lane {parent} is idle")
        row.segment.seal()
        view = View(row.view, [Entry(row.segment)])
        self.start(lanes, view, (*row.forks, view))

    def join(self, parent: int, lanes: Sequence[int]) -> None:
        """The branches in `lanes` are stitched, and their parent goes on in one lane."""
        rows = [row for row in (self.rows[lane] for lane in lanes) if row is not None]
        for lane, row in zip(lanes, rows, strict=True):
            row.segment.seal()
            self.rows[lane] = None
        view = View(rows[0].view, [Entry(row.segment) for row in rows])
        self.start([parent], view, rows[0].forks[:-1])

    def extend(self) -> None:
        """Every lane has written what it had pages for."""
        for row in self.rows:
            if row is not None:
                row.segment.append([0] * HORIZON)
                self.reserve(row.segment)

    def plan(self) -> Planned:
        """Plan the lanes as they are."""
        planned = self.planner.plan(self.rows, 0, self.lists)
        if not isinstance(planned, Planned):
            raise SystemExit(f"does not fit: {planned}")
        return planned


def joins(lanes: int) -> Wave:
    """Lanes in eight groups, each on a join of its own, over one join that all see."""
    wave = Wave()
    root = wave.link(None, 100)
    each = (SEGMENTS - 100 - LANES) // 8
    for group in range(8):
        view = wave.link(root, each)
        wave.start(range(group * lanes // 8, (group + 1) * lanes // 8), view, (root, view))
    return wave


def loops(lanes: int) -> Wave:
    """Each lane at the end of a chain of its own."""
    wave = Wave()
    root = wave.link(None, 100)
    for lane in range(lanes):
        view = root
        for _ in range((SEGMENTS - 100 - LANES) // LANES + 1):
            view = wave.link(view, 1)
        wave.start([lane], view, (root,))
    return wave


def chain(lanes: int) -> Wave:
    """Branches of one fork, at the end of a long chain of links."""
    wave = Wave()
    view = wave.link(None, 1)
    for _ in range(SEGMENTS - LANES - 1):
        view = wave.link(view, 1)
    wave.start(range(lanes), view, (view,))
    return wave


def timed(action: Callable[[], object]) -> float:
    """Microseconds that `action` takes."""
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e6


def report(name: str, planned: Planned, elapsed_us: Sequence[float]) -> None:
    """One line."""
    best, median = min(elapsed_us), statistics.median(elapsed_us)
    print(f"| {name} | {planned.tasks} | {planned.task_rows} | {best:.0f} | {median:.0f} |")


def main() -> None:
    """Time both events on each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    print("| event | tasks | (row, run) pairs | best us | median us |")
    print("| --- | --- | --- | --- | --- |")
    for shape in (joins, loops, chain):
        elapsed = []
        wave = shape(LANES)
        planned = wave.plan()
        for repeat in range(options.repeats):
            lane = repeat * 7 % LANES
            row = wave.rows[lane]
            elapsed.append(timed(lambda wave=wave, lane=lane: (wave.finish(lane), wave.plan())))  # type: ignore[misc]
            if row is None or row.view is None:
                raise SystemExit("an idle lane")
            # The next finish is again one of 64 lanes.
            wave.start([lane], row.view, row.forks)
            planned = wave.plan()
        report(f"finish, {shape.__name__}", planned, elapsed)
        forks, joined, extended = [], [], []
        for _ in range(max(3, options.repeats // 4)):
            wave = shape(LANES - FORK + 1)
            wave.plan()
            parent = next(lane for lane, row in enumerate(wave.rows) if row is not None)
            lanes = [parent, *(lane for lane, row in enumerate(wave.rows) if row is None)][:FORK]
            forks.append(timed(lambda wave=wave, at=parent, to=lanes: (wave.fork(at, to), wave.plan())))  # type: ignore[misc]
            of_fork = wave.plan()
            extended.append(timed(lambda wave=wave: (wave.extend(), wave.plan())))  # type: ignore[misc]
            of_horizon = wave.plan()
            joined.append(timed(lambda wave=wave, at=parent, of=lanes: (wave.join(at, of), wave.plan())))  # type: ignore[misc]
            planned = wave.plan()
        report(f"fork of {FORK}, {shape.__name__}", of_fork, forks)
        report(f"horizon, {shape.__name__}", of_horizon, extended)
        report(f"join of {FORK}, {shape.__name__}", planned, joined)


if __name__ == "__main__":
    main()
