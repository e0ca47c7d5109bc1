"""The worst-case clock: drives the scheduler over a graph in which everything takes as long as it can, and records it.

Each thread walks its region and asks for work, branches, a loop or a choice. Threads that come to the same loop at the
same moment are a group: one round of its body is recorded by a clock of its own while the other threads wait, so that
nothing depends on how many rounds there are; the arms of a condition are recorded likewise, one after the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from typing import TypeAlias, assert_never

from anabranch.compiler.bounds import Bounds, PlanBounds, reduce_groups
from anabranch.compiler.graph import (
    Call,
    Cond,
    Decode,
    Expand,
    Fork,
    Let,
    Loop,
    Map,
    Need,
    Reduce,
    Region,
    Return,
    Write,
)
from anabranch.compiler.profile import pages_of
from anabranch.compiler.schedule import (
    Alias,
    Choose,
    Flush,
    Free,
    Moved,
    Part,
    Prefill,
    Ref,
    Repeat,
    Runs,
    Schedule,
    Step,
    Stitch,
    num_calls,
    runs,
)
from anabranch.compiler.schedule import Decode as DecodeStep
from anabranch.compiler.scheduler import Child, Machine, Scheduler, Thread
from anabranch.compiler.scheduler import Fork as ScheduledFork
from anabranch.compiler.scheduler import Step as Scheduled
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.spec import JoinSpec

MAX_THREADS = 100_000
"""The most threads that a static schedule has, a loop's counted once: it is written out, and 100,000 take about 2 s and
150 MB. A run is not held to it, since its branches are made as they start."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Rows to feed and tokens to draw.

    nodes: whose known tokens these are, the last of which draws
    aside: those of `rows` that are taken back
    flush: the rows are drawn tokens, which have their slots already
    """

    rows: int
    draws: int = 0
    nodes: tuple[Ref, ...] = ()
    aside: int = 0
    flush: bool = False


@dataclass(frozen=True, slots=True)
class _Kind:
    """Equal branches of a fork."""

    plan: PlanBounds
    depth: int
    region: Region
    count: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class _Spawn:
    """Branches to run; the answer is how many tokens the join has to flush."""

    node: Fork | Map | Reduce | Call
    kinds: tuple[_Kind, ...]
    children: Sequence[Child]
    join: JoinSpec
    limit: int | None


_Request: TypeAlias = _Work | _Spawn | Loop | Cond
_Walk: TypeAlias = "Generator[_Request, int | bool | None, bool]"


@dataclass(slots=True, eq=False)
class _Run:
    """A thread as it runs.

    segment, length: the open segment, and its tokens; own: its other segments; pages: of all of them
    unfed: its last token is drawn and not fed
    first_seal: tokens of the segment that was open at the start of a stretch, once it is sealed
    later: pages that the rounds still to come of loops around it will have added by their last
    """

    number: int
    plan: PlanBounds
    depth: int
    fork: _Group | None
    segment: int
    walk: _Walk | None = None
    thread: Thread | None = None
    lane: int | None = None
    length: int = 0
    own: list[int] = field(default_factory=list)
    pages: int = 0
    unfed: bool = False
    work: _Work | None = None
    group: _Group | None = None
    first_seal: int | None = None
    later: int = 0
    returned: bool = False


@dataclass(slots=True, eq=False)
class _Group:
    """A fork while its branches run."""

    parent: _Run
    request: _Spawn
    ends: list[int]
    scheduled: ScheduledFork | None = None
    left: int = 0
    numbers: list[int] = field(default_factory=list)
    kept: list[tuple[int, _Run]] = field(default_factory=list)


def record(bounds: Bounds) -> Schedule:
    """The static schedule of the worst case.

    Raises ValueError if the pool is smaller than the depth-first peak, and PlanError `schedule-too-large`, without a
    source, for a plan of more than `MAX_THREADS` threads.
    """
    recorder = _Recorder(bounds)
    clock = _Clock(recorder, bounds.machine)
    main = bounds.plan_bounds(bounds.graph.main)
    run = _Run(0, main, 0, None, recorder.new_segments(1))
    recorder.num_threads = 1
    run.walk = recorder.walk_thread(run, main.plan.region)
    clock.open(run, bounds.root())
    clock.go()
    recorder.drop([run], clock.steps)
    steps = tuple(clock.steps)
    return Schedule(
        bounds.machine, bounds.graph.main, steps, num_calls(steps), recorder.pages_peak, recorder.num_threads
    )


class _Recorder:
    """What all clocks of one recording share: numbers given out, lanes, pages."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.page_size = bounds.machine.page_size
        self.num_threads = 0
        self.num_spawned = 0
        self.num_segments = 0
        self.pages = 0
        self.pages_peak = 0
        self._free_lanes = list(range(bounds.machine.lanes))

    def new_segments(self, count: int) -> int:
        first = self.num_segments
        self.num_segments += count
        return first

    def take_lane(self) -> int:
        return heappop(self._free_lanes)

    def leave_lane(self, lane: int) -> None:
        heappush(self._free_lanes, lane)

    def take_lanes(self, lanes: Sequence[int]) -> None:
        """Take these, which are free."""
        taken = set(lanes)
        self._free_lanes = sorted(lane for lane in self._free_lanes if lane not in taken)

    def hold(self, run: _Run, pages: int) -> None:
        """`run` holds `pages` more."""
        run.pages += pages
        self.pages += pages

    def note_peak(self) -> None:
        """Between two calls, when options that were scored have been taken back."""
        self.pages_peak = max(self.pages_peak, self.pages)

    def grow(self, run: _Run, tokens: int) -> None:
        """`run` writes `tokens` into its open segment."""
        size = self.page_size
        more = (run.length + tokens + size - 1) // size - (run.length + size - 1) // size
        run.length += tokens
        if more:
            self.hold(run, more)

    def seal(self, run: _Run) -> None:
        """The open segment of `run` is closed; it writes another one."""
        if run.first_seal is None:
            run.first_seal = run.length
        run.own.append(run.segment)
        run.length = 0

    def drop(self, ended: Sequence[_Run], steps: list[Step]) -> None:
        """Free all that `ended` hold."""
        segments: list[int] = []
        for run in ended:
            segments += run.own
            segments.append(run.segment)
            self.pages -= run.pages
            run.pages = 0
        if segments:
            steps.append(Free(runs(sorted(segments))))

    def make_room(self, threads: int) -> None:
        """Refuse to write out so many more threads where that makes too many."""
        self.num_spawned += threads
        if self.num_spawned >= MAX_THREADS:
            main = self.bounds.plan_bounds(self.bounds.graph.main).plan
            raise PlanError(
                Diagnostic(
                    "schedule-too-large",
                    f"the static schedule of `{main.name}` has more than {MAX_THREADS:,} threads",
                    main.span,
                    help="the plan may run all the same; to see a schedule, lower its widths",
                )
            )

    # --- walks

    def walk_thread(self, run: _Run, region: Region, *, fresh_call: bool = False) -> _Walk:
        """Walk a thread from its start to its end."""
        rows = run.plan.start if fresh_call else 0
        rows += run.plan.fed.starts[region.entry].rows if region.entry in run.plan.fed.starts else 0
        return self._walk(run, region, rows)

    def _walk(self, run: _Run, region: Region, rows: int = 0) -> _Walk:
        """Walk a region; `rows` known tokens wait to be fed before it. Returns whether the thread ends in it."""
        plan, depth = run.plan, run.depth
        name = plan.plan.name
        nodes: list[Ref] = []
        for node in region.nodes:
            match node:
                case Write():
                    fed = plan.fed.at[node.dst].rows
                    if fed:
                        rows += fed
                        nodes.append((name, node.dst))
                case Decode():
                    feed = plan.fed.at[node.dst]
                    draws = plan.cost_of(node, depth).decoded
                    rows += feed.rows
                    if feed.rows or draws:
                        nodes.append((name, node.dst))
                    if draws or feed.aside:
                        yield _Work(rows + feed.aside, draws, tuple(nodes), feed.aside)
                        rows, nodes = 0, []
                        run.unfed = draws > 0
                case Fork() | Map() | Call() | Reduce():
                    rows += plan.fed.at[node.dst].rows
                    for spawn in self._spawns(plan, node, depth):
                        if rows:
                            yield _Work(rows, 0, tuple(nodes))
                        elif run.unfed:
                            yield _Work(1, flush=True)
                        rows, nodes, run.unfed = 0, [], False
                        flushes = yield spawn
                        if flushes:
                            yield _Work(int(flushes), flush=True)
                    rows += plan.fed.joined[node.dst].rows if node.dst in plan.fed.joined else 0
                case Loop() | Cond():
                    if rows:
                        yield _Work(rows, 0, tuple(nodes))
                        rows, nodes, run.unfed = 0, [], False
                    if (yield node):  # the thread has ended inside
                        return True
                case Let() | Need():
                    pass
                case Return():
                    if rows:
                        yield _Work(rows, 0, tuple(nodes))
                        run.unfed = False
                    return True
                case Expand():
                    raise ValueError("`expand` cannot be scheduled")
                case _:
                    assert_never(node)
        if rows:
            yield _Work(rows, 0, tuple(nodes))
            run.unfed = False
        return False

    def walk_part(self, run: _Run, region: Region) -> _Walk:
        """Walk the body of a loop, or an arm."""
        return self._walk(run, region)

    def _spawns(self, plan: PlanBounds, node: Fork | Map | Call | Reduce, depth: int) -> Generator[_Spawn, None, None]:
        """The forks that a node is: one, or one for each level of a reduce."""
        limits = node.limits
        match node:
            case Fork(arms=arms):
                kinds = [
                    _Kind(plan, depth, arm.region, arm.multiplicity, limits.fresh or arm.limits.fresh) for arm in arms
                ]
                join = node.join
            case Map(region=region, most=most):
                kinds, join = [_Kind(plan, depth, region, most, limits.fresh)], node.join
            case Reduce(region=region):
                for groups in reduce_groups(node.most, node.by):
                    kind = _Kind(plan, depth, region, groups, limits.fresh)
                    children = self.bounds.children(node, groups, depth)
                    yield _Spawn(node, (kind,), children, JoinSpec(), limits.limit)
                return
            case Call(plan=callee):
                below = depth + 1 if callee == plan.plan.name else 0
                called = self.bounds.plan_bounds(callee)
                if below > called.deepest:
                    return
                kinds, join = [_Kind(called, below, called.plan.region, 1, limits.fresh)], JoinSpec("first", 1)
            case _:
                assert_never(node)
        count = sum(kind.count for kind in kinds)
        if count:
            yield _Spawn(node, tuple(kinds), self.bounds.children(node, count, depth), join, limits.limit)


class _Clock:
    """One run of the scheduler: the whole plan's, or that of a loop's body or an arm for a group of threads."""

    def __init__(self, recorder: _Recorder, machine: Machine) -> None:
        self.recorder = recorder
        self.scheduler = Scheduler(machine)
        self.steps: list[Step] = []
        self._runs: dict[Thread, _Run] = {}
        self._groups: dict[ScheduledFork, _Group] = {}
        self._at: dict[tuple[int, int], tuple[Loop | Cond, list[_Run]]] = {}
        self._ended: list[_Run] = []

    def open(self, run: _Run, child: Child) -> None:
        """Let a thread begin."""
        run.thread = self.scheduler.open(child)
        self._runs[run.thread] = run

    def go(self) -> None:
        """Run until every thread has ended."""
        while True:
            if seated := self.scheduler.start():
                self._seat(seated)
            elif self._at:
                node, group = self._at.pop(next(iter(self._at)))
                if isinstance(node, Loop):
                    self._loop(node, group)
                else:
                    self._cond(node, group)
            else:
                self._free_ended()
                step = self.scheduler.next()
                if step is None:
                    break
                self._emit(step)
                for thread in self.scheduler.advance(step, step.repeat):
                    run = self._runs[thread]
                    run.work = None
                    self._on(run, None)
        if not self.scheduler.idle:
            raise RuntimeError("the schedule is stuck: no thread can run")

    # --- threads

    def _seat(self, seated: Sequence[Thread]) -> None:
        started: dict[tuple[_Group, bool], list[_Run]] = {}
        begun: list[tuple[_Run, int | None]] = []
        for thread in seated:
            run = self._runs.get(thread)
            if run is None:
                run = self._start(thread)
                assert run.fork is not None
                fresh = run.fork.request.kinds[bisect_right(run.fork.ends, thread.index)].fresh
                started.setdefault((run.fork, fresh), []).append(run)
            if run.lane is None:
                run.lane = self.recorder.take_lane()
            begun.append((run, None if run.group is None else self._stitch(run, run.group)))
        for (group, fresh), new in started.items():
            lanes = runs(run.lane for run in new if run.lane is not None)
            branches, segments = runs(run.number for run in new), runs(run.segment for run in new)
            self.steps.append(Alias(_ref(group), branches, group.parent.number, lanes, segments, fresh))
        for run, answer in begun:
            self._on(run, answer)

    def _start(self, thread: Thread) -> _Run:
        """A branch that has just been seated for the first time."""
        recorder = self.recorder
        if thread.group is None:
            raise RuntimeError(f"nobody opened {thread}")
        group = self._groups[thread.group]
        kind = group.request.kinds[bisect_right(group.ends, thread.index)]
        run = _Run(recorder.num_threads, kind.plan, kind.depth, group, recorder.new_segments(1), thread=thread)
        recorder.num_threads += 1
        self._runs[thread] = run
        called = isinstance(group.request.node, Call)
        run.walk = recorder.walk_thread(run, kind.region, fresh_call=called and kind.fresh)
        group.numbers.append(run.number)
        return run

    def _on(self, run: _Run, answer: int | bool | None) -> None:
        """Let a seated thread walk on to what it asks for next."""
        assert run.walk is not None and run.thread is not None
        try:
            request = run.walk.send(answer)
        except StopIteration as stop:
            self._end(run, bool(stop.value))
            return
        match request:
            case _Work(rows=rows, draws=draws):
                run.work = request
                self.scheduler.submit(run.thread, feed=rows, draw=draws)
            case _Spawn():
                self._spawn(run, request)
            case Loop() | Cond():
                self._at.setdefault((id(request), run.depth), (request, []))[1].append(run)
            case _:
                assert_never(request)

    def _spawn(self, run: _Run, request: _Spawn) -> None:
        assert run.thread is not None
        self.recorder.make_room(sum(kind.count for kind in request.kinds))
        self.recorder.seal(run)
        self._leave_lane(run)
        ends = list(accumulate(kind.count for kind in request.kinds))
        group = run.group = _Group(run, request, ends, left=ends[-1])
        group.scheduled = self.scheduler.fork(
            run.thread, request.children, base=run.pages + run.later, limit=request.limit
        )
        self._groups[group.scheduled] = group

    def _stitch(self, run: _Run, group: _Group) -> int:
        """The join is read; returns how many tokens it has to flush."""
        recorder = self.recorder
        run.group = None
        winners = _winners(group)
        gained: list[int] = []
        flushes = 0
        for winner in winners:
            gained += [*winner.own, winner.segment]
            run.pages += winner.pages
            flushes += winner.unfed
        won = {winner.number for winner in winners}
        self._ended += [each for _, each in group.kept if each.number not in won]
        run.own += gained
        run.segment = recorder.new_segments(1)
        assert run.lane is not None and group.scheduled is not None
        branches = runs(sorted(group.numbers))
        self.steps.append(Stitch(_ref(group), run.number, run.lane, run.segment, branches, runs(sorted(gained))))
        del self._groups[group.scheduled]
        return flushes

    def _end(self, run: _Run, returned: bool) -> None:
        thread, group = run.thread, run.fork
        assert thread is not None
        del self._runs[thread]
        if thread.group is None:
            # The plan's own thread, or one of a group, which goes on outside with its pages.
            self.scheduler.end(thread)
            self._leave_lane(run)
            run.returned = returned
            return
        assert group is not None and group.scheduled is not None and group.parent.thread is not None
        stitched = group.request.join.context == "stitch"
        self.scheduler.end(thread, kept=run.pages if stitched else 0)
        self._leave_lane(run)
        if stitched:
            group.kept.append((thread.index, run))
        else:
            self._ended.append(run)
        group.left -= 1
        if not group.left:
            self.scheduler.close(group.scheduled)
            self.scheduler.resume(group.parent.thread)

    def _leave_lane(self, run: _Run) -> None:
        assert run.lane is not None
        self.recorder.leave_lane(run.lane)
        run.lane = None

    def _free_ended(self) -> None:
        if self._ended:
            self.recorder.drop(self._ended, self.steps)
            self._ended = []

    # --- steps

    def _emit(self, step: Scheduled) -> None:
        """Write down one step, and what it adds to the segments."""
        recorder, of = self.recorder, self._runs
        feeds: dict[tuple[tuple[Ref, ...], int, bool], list[int]] = {}
        flushes: dict[tuple[tuple[Ref, ...], int, bool], list[int]] = {}
        draws: dict[tuple[tuple[Ref, ...], int, bool], list[int]] = {}
        for thread, rows in step.feeds:
            run = of[thread]
            work, lane = run.work, run.lane
            assert work is not None and lane is not None
            if work.flush:
                flushes.setdefault(((), rows, False), []).append(lane)
                continue
            final = rows == thread.feed
            first = final and work.draws > 0
            feeds.setdefault((work.nodes if final else (), rows, first), []).append(lane)
            recorder.grow(run, rows + first - (work.aside if final else 0))
        for thread in step.draws:
            run = of[thread]
            work, lane = run.work, run.lane
            assert work is not None and lane is not None
            draws.setdefault((work.nodes[-1:], 0, True), []).append(lane)
            recorder.grow(run, step.repeat)
        beside = False
        if feeds:
            self.steps.append(Prefill(_parts(feeds)))
            beside = True
        if flushes:
            self.steps.append(Flush(_parts(flushes), beside))
            beside = True
        if draws:
            self.steps.append(DecodeStep(_parts(draws), step.repeat, beside))
        recorder.note_peak()

    # --- loops and arms

    def _inside(self, group: Sequence[_Run], region: Region | None) -> list[Step]:
        """Record `region` for the threads of `group` while the others wait."""
        if region is None:
            return []
        scheduler, machine = self.scheduler, self.scheduler.machine
        threads = [run.thread for run in group if run.thread is not None]
        free = machine.pages - scheduler.reserved
        inner = Machine(
            lanes=machine.lanes - (len(scheduler.seated) - len(group)),
            pages=max(1, free + sum(thread.need.peak for thread in threads)),
            page_size=machine.page_size,
            chunk=machine.chunk,
        )
        clock = _Clock(self.recorder, inner)
        outer = [(run.walk, run.thread, run.lane) for run in group]
        for run, thread in zip(group, threads, strict=True):
            run.first_seal = None
            run.walk = self.recorder.walk_part(run, region)
            clock.open(run, Child(thread.need, thread.path_tokens))
        clock.go()
        clock._free_ended()
        # Whatever lanes they had inside, they go on in those they came with.
        for run, (walk, own, lane) in zip(group, outer, strict=True):
            run.walk, run.thread, run.lane = walk, own, lane
        self.recorder.take_lanes([lane for _, _, lane in outer if lane is not None])
        return clock.steps

    def _loop(self, node: Loop, group: list[_Run]) -> None:
        self._free_ended()
        recorder, page_size, more = self.recorder, self.recorder.page_size, node.rounds - 1
        before = [(run.segment, run.length, len(run.own), run.pages) for run in group]
        sealed = [run.first_seal for run in group]
        later = [more * run.plan.pages_a_round(node, run.depth) for run in group]
        highest, recorder.pages_peak = recorder.pages_peak, recorder.pages
        for run, pages in zip(group, later, strict=True):
            run.later += pages
        steps = self._inside(group, node.region)
        inner_peak = recorder.pages_peak
        moved: list[Moved] = []
        for run, pages, (segment, length, owned, held) in zip(group, later, before, strict=True):
            run.later -= pages
            if run.segment == segment:
                recorder.grow(run, (run.length - length) * more)
                moved.append(Moved(run.number, segment, ()))
                continue
            assert run.first_seal is not None
            first, tail = pages_of(run.first_seal, page_size), pages_of(run.length, page_size)
            inner = run.pages - (held - pages_of(length, page_size)) - first - tail
            again = inner + pages_of(run.length + run.first_seal - length, page_size)
            recorder.hold(run, again * more)
            inner_peak += again * more
            moved.append(Moved(run.number, run.segment, runs(run.own[owned + 1 :])))
        recorder.pages_peak = max(highest, inner_peak, recorder.pages)
        _keep_first_seal(group, sealed)
        ref = (group[0].plan.plan.name, node.dst)
        self.steps.append(Repeat(ref, node.rounds, tuple(steps), tuple(moved)))
        for run in group:
            self._on(run, run.returned)

    def _cond(self, node: Cond, group: list[_Run]) -> None:
        self._free_ended()
        recorder = self.recorder
        before, sealed = [_Before(run) for run in group], [run.first_seal for run in group]
        arms: list[tuple[Step, ...]] = []
        ends: list[list[_After]] = []
        pages = recorder.pages
        for region in (node.then, node.orelse):
            for was in before:
                was.put_back()
            recorder.pages = pages
            arms.append(tuple(self._inside(group, region)))
            ends.append([was.after() for was in before])
        for was in before:
            was.put_back()
        recorder.pages = pages
        merged = [self._merge(was, [end[place] for end in ends]) for place, was in enumerate(before)]
        recorder.note_peak()
        _keep_first_seal(group, sealed)
        ref = (group[0].plan.plan.name, node.dst)
        moved = tuple(tuple(after.moved for after in end) for end in ends)
        self.steps.append(Choose(ref, tuple(arms), moved, tuple(merged)))
        for run in group:
            self._on(run, run.returned)

    def _merge(self, was: _Before, ends: Sequence[_After]) -> Moved:
        """Let a thread go on with the larger of what its arms made, part by part."""
        recorder, run = self.recorder, was.run
        run.unfed = any(end.unfed for end in ends)
        run.returned = all(end.returned for end in ends)
        head = max(end.head for end in ends)
        recorder.grow(run, head - run.length)
        if not any(end.sealed for end in ends):
            return Moved(run.number, run.segment, ())
        recorder.seal(run)
        gained: Runs = ()
        inner = max(end.inner for end in ends)
        if any(end.moved.gained for end in ends):
            stands_for = recorder.new_segments(1)
            run.own.append(stands_for)
            gained = ((stands_for, 1),)
            recorder.hold(run, inner)
        run.segment = recorder.new_segments(1)
        recorder.grow(run, max(end.tail for end in ends))
        return Moved(run.number, run.segment, gained)


class _Before:
    """How a thread stood before a choice."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self._segment, self._length, self._owned = run.segment, run.length, len(run.own)
        self._pages, self._unfed = run.pages, run.unfed

    def put_back(self) -> None:
        """Let the thread stand so again."""
        run = self.run
        run.segment, run.length, run.pages, run.unfed = self._segment, self._length, self._pages, self._unfed
        run.returned, run.first_seal = False, None
        del run.own[self._owned :]

    def after(self) -> _After:
        """What has come of it in an arm."""
        run, sealed = self.run, self.run.segment != self._segment
        gained = runs(run.own[self._owned + 1 :]) if sealed else ()
        page_size = run.plan.machine.page_size
        head, tail = (run.first_seal or 0, run.length) if sealed else (run.length, 0)
        inner = run.pages - (self._pages - pages_of(self._length, page_size))
        inner -= pages_of(head, page_size) + pages_of(tail, page_size)
        moved = Moved(run.number, run.segment, gained)
        return _After(moved, sealed, head, inner, tail, run.unfed, run.returned)


@dataclass(frozen=True, slots=True)
class _After:
    """How a thread comes out of an arm.

    head: tokens in the segment that was open before; tail: in the one open now, if that is another
    inner: pages of the segments between
    """

    moved: Moved
    sealed: bool
    head: int
    inner: int
    tail: int
    unfed: bool
    returned: bool


def _keep_first_seal(group: Sequence[_Run], sealed: Sequence[int | None]) -> None:
    """A stretch around this one measures from its own start."""
    for run, length in zip(group, sealed, strict=True):
        if length is not None:
            run.first_seal = length


def _winners(group: _Group) -> list[_Run]:
    """The branches that the join stitches in the worst case."""
    join = group.request.join
    if join.context != "stitch":
        return []
    ended = [run for _, run in sorted(group.kept, key=lambda each: each[0])]
    match join.kind:
        case "all":
            return ended
        case "first":
            return ended[: join.count or 1]
        case "vote" | "best" | "quorum":
            return [max(ended, key=lambda run: run.pages)] if ended else []
        case _:
            assert_never(join.kind)


def _ref(group: _Group) -> Ref:
    return group.parent.plan.plan.name, group.request.node.dst


def _parts(lanes: dict[tuple[tuple[Ref, ...], int, bool], list[int]]) -> tuple[Part, ...]:
    return tuple(Part(runs(sorted(found)), nodes, rows, draws) for (nodes, rows, draws), found in lanes.items())
