"""Plans as the scheduler sees them, trees of work that forks and joins, and what a run of them takes in calls.

A branch is a sequence of items: work (rows to feed, then tokens to draw) and forks, whose join waits for all of their
branches. `measure` runs such plans through the real `Scheduler` as the engine does: threads go on between two calls, a
gen that ends early is stopped. It checks on the way that no call wastes a lane or a row that something could use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from anabranch.compiler.scheduler import Child, Machine, Need, Policy, Scheduler, Step, Thread

# branch = item*
# item = Work(feed, draw, most)
#      | Fork(branches, limit)


@dataclass(frozen=True, slots=True)
class Work:
    """`feed` known rows, then `draw` tokens. most: the draws that were foreseen, at least `draw`."""

    feed: int
    draw: int
    most: int

    def steps(self, chunk: int) -> int:
        """Calls that it takes alone: the first token comes with the last row."""
        return -(-self.feed // chunk) + self.draw - (1 if self.feed and self.draw else 0)


@dataclass(frozen=True)
class Fork:
    """Branches and a join that waits for all of them. limit: how many may run at once."""

    branches: tuple[Branch, ...]
    limit: int | None = None


@dataclass(frozen=True)
class Branch:
    """What one thread does, in order."""

    items: tuple[Item, ...]

    @cached_property
    def foreseen(self) -> int:
        """Tokens on its longest chain, as `path_tokens` counts them."""
        return sum(tokens_foreseen(item) for item in self.items)


Item: TypeAlias = Work | Fork


def tokens_foreseen(item: Item) -> int:
    """Tokens on the longest chain of an item. Under a limit of k, work / k + longest, at most ceil(n / k) x longest."""
    if isinstance(item, Work):
        return item.most
    paths = [branch.foreseen for branch in item.branches]
    return limited(sum(paths), max(paths), len(paths), item.limit)


def limited(total: int, longest: int, count: int, limit: int | None) -> int:
    """The longest chain of a fork whose branches come to `total` (Graham 1969; docs/scheduler.md)."""
    if limit is None or limit >= count:
        return longest
    return min((total - longest) // limit + longest, -(-count // limit) * longest)


def branches_of(branch: Branch) -> Iterator[Branch]:
    """A branch and all inside it."""
    stack = [branch]
    while stack:
        one = stack.pop()
        yield one
        stack.extend(inner for item in one.items if isinstance(item, Fork) for inner in item.branches)


@dataclass(frozen=True, slots=True)
class Figures:
    """What plans in one batch come to. The last two are of no use under a `limit=`, whose chains are upper bounds.

    units: decoded tokens, and feeds that no draw follows; rows: fed rows
    critical_path: calls on the longest chain
    lane_calls: calls for which threads hold a lane, if none has to wait for rows
    width: most threads that could run at once
    """

    units: int
    rows: int
    critical_path: int
    lane_calls: int
    width: int

    def work(self, machine: Machine) -> float:
        """The work in calls, as docs/scheduler.md counts it: units over the lanes, and rows over the chunk."""
        return self.units / machine.lanes + self.rows / machine.chunk

    def steps_bound(self, machine: Machine) -> int:
        """What docs/scheduler.md says a run never exceeds."""
        return self.units // machine.lanes + self.rows // machine.chunk + self.critical_path

    def floor(self, machine: Machine) -> int:
        """No schedule takes fewer calls."""
        return max(self.critical_path, -(-self.lane_calls // machine.lanes), -(-self.rows // machine.chunk))


def figures(plans: Sequence[Branch], chunk: int) -> Figures:
    """The figures of `plans` in one batch, or of the branches of a fork."""
    inside = [branch for plan in plans for branch in branches_of(plan)]
    work = [item for branch in inside for item in branch.items if isinstance(item, Work)]
    return Figures(
        units=sum(item.draw or 1 for item in work),
        rows=sum(item.feed for item in work),
        critical_path=max(chain(plan, chunk) for plan in plans),
        lane_calls=sum(item.steps(chunk) for item in work),
        width=sum(widest(plan) for plan in plans),
    )


def chain(branch: Branch, chunk: int) -> int:
    """Calls on the longest chain of dependencies of a branch."""
    total = 0
    for item in branch.items:
        if isinstance(item, Work):
            total += item.steps(chunk)
        else:
            chains = [chain(inner, chunk) for inner in item.branches]
            total += limited(sum(chains), max(chains), len(chains), item.limit)
    return total


def widest(branch: Branch) -> int:
    """Most threads of a branch that could run at once."""
    most = 1
    for item in branch.items:
        if isinstance(item, Fork):
            widths = sorted((widest(inner) for inner in item.branches), reverse=True)
            most = max(most, sum(widths[: item.limit]))
    return most


class Wasted(Exception):
    """A call left a lane or a row of the chunk unused that a thread could have used."""


@dataclass(slots=True, eq=False)
class _Run:
    """A thread as it runs. at: the item that it is in; left: draws until its work ends.

    tail: tokens foreseen between its end and its plan's; after_join: those between the join of its fork and that end
    forked_at: calls before its fork
    """

    branch: Branch
    tail: int
    at: int = -1
    left: int = 0
    after_join: int = 0
    forked_at: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What plans took. stages: each fork of a plan's own thread, with the calls from it until its join."""

    calls: int
    stages: tuple[tuple[Fork, int], ...]


def measure(plans: Sequence[Branch], machine: Machine, policy: Policy | None = None) -> Measured:
    """Run `plans`, all opened at once, on `machine`; a `policy` must hold nothing back. Raises Wasted."""
    driver = _Driver(plans, machine, policy)
    driver.go()
    return Measured(driver.calls, tuple(driver.stages))


class _Driver:
    """What the engine is to the scheduler, without tokens. A thread claims one page, so pages never press."""

    def __init__(self, plans: Sequence[Branch], machine: Machine, policy: Policy | None) -> None:
        self.machine = machine
        self.scheduler = Scheduler(machine, policy)
        self.runs: dict[Thread, _Run] = {}
        self.calls = 0
        self.waiting = 0
        self.stages: list[tuple[Fork, int]] = []
        for plan in plans:
            thread = self.scheduler.open(Child(Need(1), plan.foreseen))
            self.runs[thread] = _Run(plan, 0)
            self.waiting += 1

    def go(self) -> None:
        scheduler = self.scheduler
        while True:
            while seated := scheduler.start():
                for thread in seated:
                    self.waiting -= 1
                    self.walk(thread)
            step = scheduler.next()
            if step is None:
                break
            self.check(step)
            self.run(step)
        if self.runs:
            raise Wasted(f"{len(self.runs)} threads never ran")

    def run(self, step: Step) -> None:
        """One call, or as many alike as there are before something ends."""
        times = min([step.repeat, *(self.runs[thread].left for thread in step.draws)])
        drawn = [*step.draws, *(thread for thread, rows in step.feeds if rows == thread.feed and thread.draw)]
        done = dict.fromkeys(self.scheduler.advance(step, times))
        self.calls += times
        for thread in drawn:
            run = self.runs[thread]
            run.left -= times
            if not run.left:
                self.scheduler.stop(thread)
                done[thread] = None
        for thread in done:
            self.walk(thread)

    def walk(self, thread: Thread) -> None:
        """Let a seated thread go on to its next work, its next fork or its end."""
        run = self.runs.get(thread)
        if run is None:
            group, parent = thread.group, thread.parent
            assert group is not None
            assert parent is not None
            above = self.runs[parent]
            fork = above.branch.items[above.at]
            assert isinstance(fork, Fork)
            run = self.runs[thread] = _Run(fork.branches[thread.index], above.after_join)
        run.at += 1
        if run.at == len(run.branch.items):
            self.end(thread)
            return
        item = run.branch.items[run.at]
        match item:
            case Work():
                run.left = item.draw
                self.scheduler.submit(thread, feed=item.feed, draw=item.most if item.draw else 0)
            case Fork():
                run.forked_at = self.calls
                run.after_join = run.tail + sum(tokens_foreseen(later) for later in run.branch.items[run.at + 1 :])
                children = [Child(Need(1), branch.foreseen + run.after_join) for branch in item.branches]
                self.scheduler.fork(thread, children, base=1, limit=item.limit)
                self.waiting += min(len(children), item.limit or len(children))

    def end(self, thread: Thread) -> None:
        del self.runs[thread]
        self.scheduler.end(thread)
        group, parent = thread.group, thread.parent
        if group is None or parent is None:
            return
        if group.limit is not None and group.pending >= group.limit - len(group.active):
            self.waiting += 1
        if not group.active and not group.pending:
            self.scheduler.close(group)
            self.scheduler.resume(parent)
            if parent.parent is None:
                above = self.runs[parent]
                fork = above.branch.items[above.at]
                assert isinstance(fork, Fork)
                self.stages.append((fork, self.calls - above.forked_at))
            self.waiting += 1

    def check(self, step: Step) -> None:
        """Every lane is held, or nobody waits; every thread that holds one gets on, or the chunk is full."""
        seated = self.scheduler.seated
        if self.waiting and len(seated) < self.machine.lanes:
            raise Wasted(f"call {self.calls}: {self.waiting} threads wait, {len(seated)} lanes are held")
        if len(seated) > self.machine.lanes:
            raise Wasted(f"call {self.calls}: {len(seated)} threads on {self.machine.lanes} lanes")
        rows = sum(count for _, count in step.feeds)
        if rows > self.machine.chunk:
            raise Wasted(f"call {self.calls}: {rows} rows in a chunk of {self.machine.chunk}")
        if rows < self.machine.chunk and any(count < thread.feed for thread, count in step.feeds):
            raise Wasted(f"call {self.calls}: rows are left over")
        if rows < self.machine.chunk and len(step.feeds) + len(step.draws) != len(seated):
            raise Wasted(f"call {self.calls}: a thread that holds a lane does not get on")
