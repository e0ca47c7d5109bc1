"""The one scheduler: a pure state machine that hands out the next step and is told what completed.

Three clocks drive it. The compiler's clock completes every piece of work at its worst case and records the static
schedule; the engine's completes what the model really did; a simulator's completes what a trace says. It knows no
tokens and no tensors: a thread is a lane holder with rows to feed and tokens to draw, and a claim on pages.

    open a plan   -> its thread waits, first come first served, until the pool holds its depth-first peak
    fork          -> children wait; each starts when a lane and its pages are free; the parent gives its lane back
    submit        -> a seated thread has `feed` known rows to feed, then `draw` tokens to draw
    next          -> seat what may start, and hand out one step: every seated thread advances, prefill within `chunk`
    advance       -> that step happened (`times` times over)
    end, close    -> a thread is over; a fork's join has been read

Pages (no deadlock). A plan is admitted with its depth-first peak reserved, and that reservation runs its children one
after another. Of a fork's running children one is *carried* by the parent's reservation; every other is charged to the
free pool before it starts, so at any time every started thread can run to its end inside what is reserved for it.
A fork whose children's kept pages all fit beside the widest child (`wide`) charges a further child only for what it
gives back at its end (peak - kept); otherwise the full peak, and what it kept stays charged until the join.
Sources: Liu 1986 (the order of children when the pool is tight), Graham 1969 and Brent 1974 (list schedules).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Machine:
    """What a schedule runs on.

    lanes: threads that may hold a row of the batch at once
    pages: KV pages in the pool
    page_size: token slots in a page
    chunk: most prefilled rows in one step
    """

    lanes: int = 64
    pages: int = 4096
    page_size: int = 16
    chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("lanes", "pages", "page_size", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Need:
    """A thread's worst case. peak: pages while it runs, its children depth first; kept: pages left until the join."""

    peak: int
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Child:
    """A branch to start. path_tokens: tokens it may decode on its longest chain, with what follows the join."""

    need: Need
    path_tokens: int = 0


State: TypeAlias = Literal["pending", "seated", "waiting", "ready", "ended"]


class Thread:
    """A thread as the scheduler sees it. `index` is the branch index in its fork (or the plan's number)."""

    __slots__ = (
        "carried", "charge", "draw", "feed", "forks", "group", "index", "need", "order", "parent", "path_tokens",
        "plan", "state",
    )  # fmt: skip

    def __init__(self, plan: int, parent: Thread | None, group: Fork | None, index: int, child: Child) -> None:
        self.plan = plan
        self.parent = parent
        self.group = group
        self.index = index
        self.need = child.need
        self.path_tokens = child.path_tokens
        self.order = 0
        self.state: State = "pending"
        self.feed = 0
        self.draw = 0
        self.carried = False
        self.charge = 0
        self.forks: list[Fork] = []

    def __repr__(self) -> str:
        return f"Thread(plan={self.plan}, index={self.index}, {self.state}, feed={self.feed}, draw={self.draw})"


class Fork:
    """The children of one fork, map, reduce level or call: those still to start, in the order in which they will."""

    __slots__ = (
        "active",
        "carrier",
        "children",
        "closed",
        "extra",
        "limit",
        "next",
        "order",
        "parent",
        "queued",
        "starts",
        "wide",
    )

    def __init__(self, parent: Thread, children: Sequence[Child], limit: int | None, order: int) -> None:
        self.parent = parent
        self.children = children
        self.limit = limit
        self.order = order
        self.starts: Sequence[int] = range(len(children))
        self.next = 0
        self.active: dict[int, Thread] = {}
        self.carrier: Thread | None = None
        self.extra = 0
        self.wide = False
        self.closed = False
        self.queued = False

    @property
    def pending(self) -> int:
        """How many children have not started."""
        return 0 if self.closed else len(self.starts) - self.next


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the model.

    feeds: (thread, rows) prefilled by this step; a thread whose feed ends here draws its first token, if it draws
    draws: threads that feed their last token (or nothing, where they start from kept logits) and draw one
    repeat: how many times this step can run before anything changes, if nothing ends early
    """

    feeds: tuple[tuple[Thread, int], ...]
    draws: tuple[Thread, ...]
    repeat: int = 1


class Scheduler:
    """See the module's docstring. All methods are deterministic functions of the calls so far."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reserved = 0
        self._plans = 0
        self._orders = 0
        self._queue: list[tuple[int, Thread]] = []
        self._ready: list[tuple[int, int, int, int, Thread]] = []
        self._startable: list[tuple[int, int, int, int, Fork]] = []
        self._short: list[Fork] = []
        self._seated: list[Thread] = []

    def open(self, child: Child) -> Thread:
        """A plan's own thread, to be started first come, first served. Raises ValueError if it can never fit."""
        if child.need.peak > self.machine.pages:
            raise ValueError(f"the plan needs {child.need.peak} pages and the pool has {self.machine.pages}")
        thread = Thread(self._plans, None, None, self._plans, child)
        self._plans += 1
        heappush(self._queue, (thread.plan, thread))
        return thread

    def fork(
        self,
        parent: Thread,
        children: Sequence[Child],
        *,
        base: int,
        limit: int | None = None,
        only: Collection[int] | None = None,
    ) -> Fork:
        """`parent` (seated, without work) waits for `children`.

        base: pages that the parent holds now, which its reservation includes
        limit: how many children may run at once
        only: the children that start, if not all; the pages of all are reckoned with
        """
        self._leave(parent)
        parent.state = "waiting"
        fork = Fork(parent, children, limit, self._orders)
        self._orders += 1
        parent.forks.append(fork)
        if children:
            self._plan_pages(fork, base)
            if only is not None:
                fork.starts = [index for index in fork.starts if index in only]
            self._offer(fork)
        return fork

    def submit(self, thread: Thread, *, feed: int = 0, draw: int = 0) -> None:
        """A seated thread without work has `feed` rows to feed and then `draw` tokens to draw."""
        if thread.state != "seated":
            raise ValueError(f"only a seated thread takes work: {thread}")
        if thread.feed or thread.draw or feed < 0 or draw < 0 or feed + draw == 0:
            raise ValueError(f"work of {feed} rows and {draw} tokens cannot be given to {thread}")
        thread.feed = feed
        thread.draw = draw

    def start(self) -> list[Thread]:
        """Seat every thread that may be seated now, and return them: new ones first run their first statement."""
        seated: list[Thread] = []
        lanes = self.machine.lanes
        while len(self._seated) < lanes and self._ready:
            thread = heappop(self._ready)[-1]
            if thread.state == "ready":
                seated.append(self._sit(thread))
        while len(self._seated) < lanes and self._startable:
            fork = heappop(self._startable)[-1]
            fork.queued = False
            if fork.pending:
                child = self._start_child(fork)
                if child is None:
                    self._short.append(fork)
                else:
                    seated.append(self._sit(child))
                    self._offer(fork)
        while len(self._seated) < lanes and self._queue:
            thread = self._queue[0][-1]
            if thread.state == "pending":
                if self.reserved + thread.need.peak > self.machine.pages:
                    break
                thread.charge = thread.need.peak
                self.reserved += thread.charge
                seated.append(self._sit(thread))
            heappop(self._queue)
        return seated

    def next(self) -> Step | None:
        """The next step, or None while no seated thread has work. Call `start` first."""
        room = self.machine.chunk
        feeds: list[tuple[Thread, int]] = []
        draws: list[Thread] = []
        repeat = 0
        for thread in self._seated:
            if thread.feed:
                rows = min(thread.feed, room)
                if rows:
                    feeds.append((thread, rows))
                    room -= rows
            elif thread.draw:
                draws.append(thread)
                repeat = min(repeat, thread.draw) if repeat else thread.draw
        if not feeds and not draws:
            return None
        return Step(tuple(feeds), tuple(draws), 1 if feeds else repeat)

    def advance(self, step: Step, times: int = 1) -> list[Thread]:
        """`step` ran `times` times (at most `step.repeat`). Returns the threads whose work is done."""
        if not 1 <= times <= step.repeat:
            raise ValueError(f"a step that repeats {step.repeat} times cannot run {times} times")
        done: list[Thread] = []
        for thread, rows in step.feeds:
            if thread.state != "seated":
                continue
            thread.feed -= rows
            if not thread.feed:
                if thread.draw:
                    thread.draw -= 1
                if not thread.draw:
                    done.append(thread)
        for thread in step.draws:
            if thread.state == "seated":
                thread.draw -= times
                if not thread.draw:
                    done.append(thread)
        return done

    def stop(self, thread: Thread) -> None:
        """A thread's work ended early (a stop, an end of turn, a complete value)."""
        thread.feed = thread.draw = 0

    def end(self, thread: Thread, *, kept: int = 0) -> None:
        """A thread is over; its own forks must be closed. kept: pages of its that stay until the join is read."""
        if thread.state == "ended":
            raise ValueError(f"ended twice: {thread}")
        if thread.forks:
            raise ValueError(f"ended with an open fork: {thread}")
        self._leave(thread)
        thread.state = "ended"
        thread.feed = thread.draw = 0
        fork = thread.group
        if fork is None:
            self.reserved -= thread.charge
            thread.charge = 0
            self._retry()
            return
        fork.active.pop(thread.index, None)
        if thread.carried:
            fork.carrier = None
            self._retry()
        elif thread.charge:
            stays = 0 if fork.wide else min(kept, thread.charge)
            fork.extra += stays
            self.reserved -= thread.charge - stays
            self._retry()
        thread.charge = 0
        if not fork.closed:
            self._offer(fork)

    def close(self, fork: Fork) -> None:
        """The fork's join has been read: its pending children never start. Its active ones must have ended."""
        if fork.active:
            raise ValueError(f"{len(fork.active)} branches still run")
        fork.closed = True
        self.reserved -= fork.extra
        fork.extra = 0
        fork.parent.forks.remove(fork)
        self._retry()

    def resume(self, parent: Thread) -> None:
        """A waiting parent goes on; it is seated by a later `start`."""
        if parent.state != "waiting":
            raise ValueError(f"not waiting: {parent}")
        parent.state = "ready"
        parent.order = self._orders
        self._orders += 1
        heappush(self._ready, (parent.plan, -parent.path_tokens, parent.order, parent.index, parent))

    @property
    def seated(self) -> Sequence[Thread]:
        """The threads that hold a lane."""
        return self._seated

    @property
    def idle(self) -> bool:
        """Nothing is seated and nothing could be: all plans are over, or something outside must happen first."""
        if self._seated or any(entry[-1].state != "ended" for entry in self._ready):
            return False
        if any(entry[-1].state != "ended" for entry in self._queue):
            return False
        return not any(fork.pending for fork in (*self._short, *(entry[-1] for entry in self._startable)))

    def _sit(self, thread: Thread) -> Thread:
        thread.state = "seated"
        self._seated.append(thread)
        return thread

    def _leave(self, thread: Thread) -> None:
        # Seats keep their order (siblings stay together), so that a batch's rows change little from step to step.
        if thread.state == "seated":
            self._seated.remove(thread)

    def _plan_pages(self, fork: Fork, base: int) -> None:
        children = fork.children
        kept = sum(c.need.kept for c in children)
        gives_back = max(c.need.peak - c.need.kept for c in children)
        wanted = base + kept + gives_back - fork.parent.need.peak
        free = self.machine.pages - self.reserved
        if wanted <= free:
            fork.wide = True
            fork.extra = max(0, wanted)
            self.reserved += fork.extra
        if fork.wide or len({c.need for c in children}) == 1:
            if len({c.path_tokens for c in children}) > 1:
                fork.starts = sorted(range(len(children)), key=lambda i: (-children[i].path_tokens, i))
        else:
            fork.starts = sorted(range(len(children)), key=lambda i: (children[i].need.kept - children[i].need.peak, i))

    def _offer(self, fork: Fork) -> None:
        if fork.queued or not fork.pending or (fork.limit is not None and len(fork.active) >= fork.limit):
            return
        child = fork.children[fork.starts[fork.next]]
        fork.queued = True
        heappush(self._startable, (fork.parent.plan, -child.path_tokens, fork.order, fork.next, fork))

    def _start_child(self, fork: Fork) -> Thread | None:
        index = fork.starts[fork.next]
        child = fork.children[index]
        thread = Thread(fork.parent.plan, fork.parent, fork, index, child)
        if fork.carrier is None:
            thread.carried = True
            fork.carrier = thread
        else:
            charge = child.need.peak - child.need.kept if fork.wide else child.need.peak
            if self.reserved + charge > self.machine.pages:
                return None
            thread.charge = charge
            self.reserved += charge
        fork.next += 1
        fork.active[index] = thread
        return thread

    def _retry(self) -> None:
        short, self._short = self._short, []
        for fork in short:
            self._offer(fork)
