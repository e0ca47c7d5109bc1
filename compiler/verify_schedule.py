"""What every schedule must hold. A schedule is gone through once, as an executor would, and each rule has a name.

A fault here is the compiler's, not the user's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, assert_never

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
    Schedule,
    Step,
    Stitch,
    members,
    num_calls,
    size,
    step_line,
)
from anabranch.compiler.schedule import Decode as DecodeStep
from anabranch.compiler.verify_graph import VerifyError

RULES = {
    "lanes-in-range": "a call uses lanes of the machine, each once, and each holds a thread",
    "chunk-in-range": "a call feeds no more rows than the machine's chunk",
    "pages-in-range": "the pages in use never pass the pool",
    "no-read-after-free": "a thread that runs, or is aliased, sees no segment that was freed",
    "freed-once": "a segment is freed once, and only when its thread is over",
    "sealed-not-written": "a thread that waits for its branches, or whose segment is sealed, writes nothing",
    "in-order": "a thread does its nodes in order of the text",
    "joined-when-over": "a join waits for all its branches, and each of them is over",
    "stitch-what-branches-wrote": "a join stitches segments of its own branches alone",
    "rounds-of-the-loop": "a loop is repeated as often as its node says, and a choice has the arms of its node",
    "every-node-once": "a node is done once by each thread that comes to it, in each arm, in one round of its loops",
    "all-rows-fed": "as many known rows are fed as the nodes have",
    "all-freed": "at the end every segment is freed",
    "peak-as-recorded": "the schedule says how many pages it needs and how many calls it makes",
}


@dataclass(slots=True)
class _Segment:
    owner: int
    length: int = 0
    extra: int = 0
    freed: bool = False
    sealed: bool = False


@dataclass(slots=True)
class _Thread:
    """last: the node it did last; waits: the fork whose branches it waits for; dead: what it sees was freed"""

    parent: int | None
    segment: int
    lane: int | None
    last: Ref | None = None
    waits: Ref | None = None
    branches: list[int] = field(default_factory=list)
    owned: list[int] = field(default_factory=list)
    dead: bool = False
    over: bool = False


def verify_schedule(schedule: Schedule, bounds: Bounds) -> Schedule:
    """Check every rule and return `schedule`, the one recorded of `bounds`. Raises VerifyError."""
    check = _Check(schedule, bounds)
    check.steps(schedule.steps)
    check.end()
    return schedule


class _Check:
    def __init__(self, schedule: Schedule, bounds: Bounds) -> None:
        self.schedule = schedule
        self.bounds = bounds
        self.machine = schedule.machine
        self.threads: dict[int, _Thread] = {0: _Thread(None, 0, 0, owned=[0])}
        self.segments: dict[int, _Segment] = {0: _Segment(0)}
        self.lanes: dict[int, int] = {0: 0}
        self.pages = self.peak = self.rows = 0
        self.done: Counter[Ref] = Counter()
        self.drawn: Counter[Ref] = Counter()
        self.started: Counter[Ref] = Counter()
        self._call_lanes: set[int] = set()
        self._call_rows = 0
        self._around: Sequence[Step] = ()
        self._place = 0

    def steps(self, steps: Sequence[Step]) -> None:
        outer = self._around, self._place
        for place, step in enumerate(steps):
            self._around, self._place = steps, place
            match step:
                case Alias():
                    self._alias(step)
                case Prefill(parts=parts, beside=beside):
                    self._call(parts, beside)
                    for part in parts:
                        self._feed(part)
                case Flush(parts=parts, beside=beside):
                    self._call(parts, beside)
                    for lane in (lane for part in parts for lane in members(part.lanes)):
                        self._running(lane)
                case DecodeStep(parts=parts, at_most=at_most, beside=beside):
                    self._call(parts, beside)
                    for part in parts:
                        self._draw(part, at_most)
                case Stitch():
                    self._stitch(step)
                case Free():
                    self._free(step)
                case Repeat():
                    self._repeat(step)
                case Choose():
                    self._choose(step)
                case _:
                    assert_never(step)
            self.peak = max(self.peak, self.pages)
            self._limit(self.pages)
        self._around, self._place = outer

    def end(self) -> None:
        """What must hold once all is done."""
        left = [number for number, segment in self.segments.items() if not segment.freed]
        if left:
            self._fault("all-freed", f"segments {left[:8]} are not freed")
        wanted = _Wanted()
        main = self.bounds.plan_bounds(self.bounds.graph.main)
        wanted.thread(self.bounds, main, main.plan.region, 0, 1)
        for what, found, expected in (
            ("is done", self.done, wanted.done),
            ("draws", self.drawn, wanted.drawn),
            ("starts branches", self.started, wanted.started),
        ):
            if found != expected:
                ref = next(ref for ref in {**found, **expected} if found[ref] != expected[ref])
                self._fault("every-node-once", f"{ref} {what} {found[ref]} times, not {expected[ref]}")
        if self.rows != wanted.rows:
            self._fault("all-rows-fed", f"{self.rows} rows are fed, not {wanted.rows}")
        said = self.schedule.pages_peak, self.schedule.calls
        if said != (self.peak, num_calls(self.schedule.steps)):
            self._fault("peak-as-recorded", f"it says {said}, and the peak is {self.peak}")

    def _fault(self, rule: str, what: str) -> NoReturn:
        lines = [f"schedule of `{self.schedule.main}`, rule {rule} ({RULES[rule]}): {what}"]
        for place in range(max(0, self._place - 2), min(len(self._around), self._place + 3)):
            mark = ">>" if place == self._place else "  "
            lines.append(f"{mark} {step_line(self._around[place], self.schedule.main)}")
        raise VerifyError(rule, "\n".join(lines))

    # --- calls of the model

    def _call(self, parts: Iterable[Part], beside: bool) -> None:
        if not beside:
            self._call_lanes = set()
            self._call_rows = 0
        for part in parts:
            for lane in members(part.lanes):
                if not 0 <= lane < self.machine.lanes or lane in self._call_lanes or lane not in self.lanes:
                    self._fault("lanes-in-range", f"lane {lane} is not there, is used twice, or is empty")
                self._call_lanes.add(lane)
            self._call_rows += part.rows * size(part.lanes)
        if self._call_rows > self.machine.chunk:
            self._fault("chunk-in-range", f"{self._call_rows} rows in one call")

    def _running(self, lane: int) -> _Thread:
        """The thread in a lane, which must be able to run."""
        thread = self.threads[self.lanes[lane]]
        if thread.waits is not None or self.segments[thread.segment].sealed:
            self._fault("sealed-not-written", f"the thread in lane {lane} waits for its branches")
        self._sees(thread)
        return thread

    def _sees(self, thread: _Thread) -> None:
        seer: _Thread | None = thread
        while seer is not None:
            if seer.dead:
                self._fault("no-read-after-free", "a segment in view was freed")
            seer = None if seer.parent is None else self.threads[seer.parent]

    def _feed(self, part: Part) -> None:
        aside = sum(self._aside(ref) for ref in part.nodes)
        for lane in members(part.lanes):
            thread = self._running(lane)
            for ref in part.nodes:
                self._next(thread, ref)
            self._grow(self.segments[thread.segment], part.rows + part.draws - aside)
        lanes = size(part.lanes)
        self.rows += part.rows * lanes
        for ref in part.nodes:
            self.done[ref] += lanes
        if part.draws:
            self.drawn[part.nodes[-1]] += lanes

    def _draw(self, part: Part, at_most: int) -> None:
        for lane in members(part.lanes):
            thread = self._running(lane)
            for ref in part.nodes:
                if thread.last != ref:
                    self._next(thread, ref)
                    self.done[ref] += 1
                self.drawn[ref] += at_most
            self._grow(self.segments[thread.segment], at_most)

    def _aside(self, ref: Ref) -> int:
        plan, ctx = ref
        return self.bounds.plan_bounds(plan).fed.at[ctx].aside

    def _next(self, thread: _Thread, ref: Ref) -> None:
        if thread.last is not None and thread.last[1] >= ref[1]:
            self._fault("in-order", f"{ref} comes after {thread.last}")
        thread.last = ref

    def _grow(self, segment: _Segment, tokens: int) -> None:
        page_size = self.machine.page_size
        before = pages_of(segment.length, page_size)
        segment.length += tokens
        self._use(pages_of(segment.length, page_size) - before)

    def _use(self, pages: int) -> None:
        self.pages += pages

    # --- forks and joins

    def _alias(self, step: Alias) -> None:
        source = self.threads.get(step.source)
        if source is None or source.over:
            self._fault("no-read-after-free", f"thread {step.source} is not there to be aliased")
        self._sees(source)
        if source.waits is None:
            if source.last is not None and source.last[1] > step.fork[1]:
                self._fault("in-order", f"{step.fork} comes after {source.last}")
            source.last, source.waits, source.branches = step.fork, step.fork, []
            self.segments[source.segment].sealed = True
        elif source.waits != step.fork:
            self._fault("sealed-not-written", f"thread {step.source} waits for {source.waits}")
        new = zip(members(step.branches), members(step.lanes), members(step.segments), strict=True)
        for number, lane, segment in new:
            if number in self.threads or segment in self.segments:
                self._fault("every-node-once", f"thread {number} or segment {segment} is there already")
            self._enter(number, lane)
            self.threads[number] = _Thread(None if step.fresh else step.source, segment, lane, owned=[segment])
            self.segments[segment] = _Segment(number)
            source.branches.append(number)
        self.started[step.fork] += size(step.branches)

    def _enter(self, number: int, lane: int) -> None:
        if not 0 <= lane < self.machine.lanes:
            self._fault("lanes-in-range", f"there is no lane {lane}")
        before = self.lanes.get(lane)
        if before is not None and self.threads[before].lane == lane:
            self.threads[before].lane = None
        self.lanes[lane] = number

    def _stitch(self, step: Stitch) -> None:
        thread = self.threads.get(step.thread)
        if thread is None or thread.waits != step.fork:
            self._fault("joined-when-over", f"thread {step.thread} does not wait for {step.fork}")
        if list(members(step.branches)) != sorted(thread.branches):
            self._fault("joined-when-over", "it goes on without all its branches")
        for number in thread.branches:
            branch = self.threads[number]
            if branch.waits is not None:
                self._fault("joined-when-over", f"thread {number} waits for branches of its own")
            self._leave(number)
        branches = set(thread.branches)
        for number in members(step.gained):
            segment = self.segments.get(number)
            if segment is None or segment.owner not in branches:
                self._fault("stitch-what-branches-wrote", f"segment {number} is no branch's")
            if segment.freed:
                self._fault("no-read-after-free", f"segment {number} was freed")
            self.threads[segment.owner].owned.remove(number)
            segment.owner, segment.sealed = step.thread, True
            thread.owned.append(number)
        self._enter(step.thread, step.lane)
        thread.lane, thread.waits, thread.segment, thread.branches = step.lane, None, step.segment, []
        self._open(step.thread, step.segment)

    def _open(self, number: int, segment: int) -> None:
        if segment in self.segments:
            self._fault("every-node-once", f"segment {segment} is there already")
        self.segments[segment] = _Segment(number)
        self.threads[number].owned.append(segment)

    def _leave(self, number: int) -> None:
        thread = self.threads[number]
        thread.over = True
        if thread.lane is not None and self.lanes.get(thread.lane) == number:
            del self.lanes[thread.lane]
        thread.lane = None

    def _free(self, step: Free) -> None:
        for number in members(step.segments):
            segment = self.segments.get(number)
            if segment is None or segment.freed:
                self._fault("freed-once", f"segment {number} is not there to be freed")
            owner = self.threads[segment.owner]
            if owner.waits is not None:
                self._fault("freed-once", f"segment {number} is seen by branches that run")
            owner.dead = segment.freed = True
            self._leave(segment.owner)
            self._use(-pages_of(segment.length, self.machine.page_size) - segment.extra)

    # --- loops and arms

    def _repeat(self, step: Repeat) -> None:
        node = self._node(step.loop)
        if not isinstance(node, Loop) or node.rounds != step.rounds:
            self._fault("rounds-of-the-loop", f"{step.loop} is repeated {step.rounds} times")
        page_size, more = self.machine.page_size, step.rounds - 1
        before = [self._state(moved.thread) for moved in step.moved]
        highest, self.peak = self.peak, self.pages
        self.steps(step.steps)
        inner_peak, gained = self.peak, 0
        for moved, was in zip(step.moved, before, strict=True):
            thread = self._back(moved, was.lane)
            head, tail = self.segments[was.segment], self.segments[thread.segment]
            if thread.segment == was.segment:
                self._grow(head, (head.length - was.length) * more)
                continue
            # In a further round the head follows on the tail of the round before.
            again = pages_of(tail.length + head.length - was.length, page_size) - pages_of(tail.length, page_size)
            again += head.extra - was.extra
            head.extra += more * again
            gained += more * again
            for number in thread.owned[was.owned :]:
                segment = self.segments[number]
                extra = more * (pages_of(segment.length, page_size) + segment.extra)
                segment.extra += extra
                gained += extra
        self._use(gained)
        self.peak = max(highest, inner_peak + gained, self.pages)
        self._limit(inner_peak + gained)

    def _choose(self, step: Choose) -> None:
        node = self._node(step.cond)
        if not isinstance(node, Cond) or len(step.arms) != 2 or len(step.ends) != 2:
            self._fault("rounds-of-the-loop", f"{step.cond} has {len(step.arms)} arms")
        before = [self._state(moved.thread) for moved in step.merged]
        pages = self.pages
        heads = [0] * len(before)
        outcomes: list[list[tuple[int, int]]] = [[] for _ in before]
        lasts: list[list[Ref | None]] = [[] for _ in before]
        for arm, ends in zip(step.arms, step.ends, strict=True):
            self.steps(arm)
            for place, (moved, was) in enumerate(zip(ends, before, strict=True)):
                thread = self._back(moved, was.lane)
                heads[place] = max(heads[place], self.segments[was.segment].length)
                inner = sum(self._pages(number) for number in thread.owned[was.owned :] if number != thread.segment)
                inner += self.segments[was.segment].extra - was.extra
                tail = self.segments[thread.segment].length if thread.segment != was.segment else 0
                outcomes[place].append((inner, tail))
                lasts[place].append(thread.last)
                # What the arm made goes on under the merged names.
                for number in thread.owned[was.owned :]:
                    self.segments[number].freed = True
            for was in before:
                self._put_back(was)
            self.pages = pages
        for place, (moved, was) in enumerate(zip(step.merged, before, strict=True)):
            thread = self.threads[was.thread]
            self._grow(self.segments[was.segment], heads[place] - was.length)
            thread.last = max((ref for ref in lasts[place] if ref is not None), key=lambda ref: ref[1], default=None)
            if moved.segment == was.segment:
                continue
            self.segments[was.segment].sealed = True
            for number in members(moved.gained):
                self._open(was.thread, number)
                self.segments[number].sealed = True
                self.segments[number].extra = max(inner for inner, _ in outcomes[place])
                self._use(self.segments[number].extra)
            thread.segment = moved.segment
            self._open(was.thread, moved.segment)
            self._grow(self.segments[moved.segment], max(tail for _, tail in outcomes[place]))

    def _pages(self, number: int) -> int:
        segment = self.segments[number]
        return pages_of(segment.length, self.machine.page_size) + segment.extra

    def _back(self, moved: Moved, lane: int | None) -> _Thread:
        """A thread comes out of a body or an arm, in the lane it had before."""
        thread = self.threads[moved.thread]
        if thread.waits is not None:
            self._fault("joined-when-over", f"thread {moved.thread} comes out while its branches run")
        if thread.segment != moved.segment:
            self._fault("sealed-not-written", f"thread {moved.thread} writes {thread.segment}, not {moved.segment}")
        if lane is None:
            self._fault("lanes-in-range", f"thread {moved.thread} had no lane")
        if thread.lane is not None and self.lanes.get(thread.lane) == moved.thread:
            del self.lanes[thread.lane]
        self._enter(moved.thread, lane)
        thread.lane = lane
        return thread

    def _state(self, number: int) -> _State:
        thread = self.threads.get(number)
        if thread is None or thread.waits is not None:
            self._fault("sealed-not-written", f"thread {number} is not there to choose")
        segment = self.segments[thread.segment]
        return _State(
            number, thread.lane, thread.segment, segment.length, segment.extra, len(thread.owned), thread.last
        )

    def _put_back(self, was: _State) -> None:
        thread = self.threads[was.thread]
        del thread.owned[was.owned :]
        thread.segment, thread.last = was.segment, was.last
        segment = self.segments[was.segment]
        segment.length, segment.extra, segment.sealed = was.length, was.extra, False

    def _limit(self, pages: int) -> None:
        # A schedule lets every gen run to its own limit, also where a budget that they share would end them sooner.
        if pages > self.machine.pages and not self.bounds.budget_binds:
            self._fault("pages-in-range", f"{pages} pages are in use, and the pool has {self.machine.pages}")

    def _node(self, ref: Ref) -> object:
        plan, ctx = ref
        return self.bounds.plan_bounds(plan).node_at(ctx)


@dataclass(frozen=True, slots=True)
class _State:
    thread: int
    lane: int | None
    segment: int
    length: int
    extra: int
    owned: int
    last: Ref | None


class _Wanted:
    """What the graph asks for, counted without the scheduler."""

    def __init__(self) -> None:
        self.done: Counter[Ref] = Counter()
        self.drawn: Counter[Ref] = Counter()
        self.started: Counter[Ref] = Counter()
        self.rows = 0

    def thread(self, bounds: Bounds, plan: PlanBounds, region: Region, depth: int, times: int) -> None:
        """`times` threads that run `region`."""
        start = plan.fed.starts.get(region.entry)
        self.rows += times * (start.rows if start is not None else 0)
        self._region(bounds, plan, region, depth, times)

    def _region(self, bounds: Bounds, plan: PlanBounds, region: Region, depth: int, times: int) -> None:
        for node in region.nodes:
            if isinstance(node, Return):
                return
            if isinstance(node, Let | Need | Expand):
                continue
            ref = (plan.plan.name, node.dst)
            feed = plan.fed.at.get(node.dst)
            self.rows += times * (feed.rows + feed.aside if feed is not None else 0)
            match node:
                case Write():
                    if feed is not None and feed.rows:
                        self.done[ref] += times
                case Decode():
                    draws = plan.cost_of(node, depth).decoded
                    self._count(ref, times, draws, feed.rows if feed is not None else 0)
                case Fork(arms=arms):
                    for arm in arms:
                        self._branch(bounds, plan, ref, arm.region, depth, times * arm.multiplicity)
                case Map(region=inner, most=most):
                    self._branch(bounds, plan, ref, inner, depth, times * most)
                case Reduce(region=inner):
                    groups = sum(reduce_groups(node.most, node.by))
                    self._branch(bounds, plan, ref, inner, depth, times * groups)
                case Call(plan=name):
                    callee = bounds.plan_bounds(name)
                    below = depth + 1 if callee is plan else 0
                    if below <= callee.deepest:
                        self.rows += times * plan.start if node.limits.fresh else 0
                        self._branch(bounds, callee, ref, callee.plan.region, below, times)
                case Loop(region=inner):
                    self._region(bounds, plan, inner, depth, times)
                case Cond(then=then, orelse=orelse):
                    self._region(bounds, plan, then, depth, times)
                    if orelse is not None:
                        self._region(bounds, plan, orelse, depth, times)
                case _:
                    assert_never(node)
            joined = plan.fed.joined.get(node.dst)
            self.rows += times * (joined.rows if joined is not None else 0)

    def _count(self, ref: Ref, times: int, draws: int, rows: int) -> None:
        if draws or rows:
            self.done[ref] += times
        if draws:
            self.drawn[ref] += times * draws

    def _branch(self, bounds: Bounds, plan: PlanBounds, ref: Ref, region: Region, depth: int, times: int) -> None:
        if times:
            self.started[ref] += times
            self.thread(bounds, plan, region, depth, times)
