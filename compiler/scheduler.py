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

Guests (preemption). Worst cases are seldom reached, so while pages are free in fact a thread may also start as a
*guest*: on half of its worst case, and with nothing reserved. A guest only writes into its own segment; before it forks
it is promoted (its need is reserved), or parks until it can be. When the pool runs out, guests are preempted, the last
admitted first: their pages go back, and they return only with a reservation, so each thread is preempted at most once,
and what is reserved is never in their way.
Sources: Liu 1986 (the order of children when the pool is tight), Graham 1969 and Brent 1974 (list schedules).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil
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


State: TypeAlias = Literal["pending", "seated", "waiting", "ready", "parked", "preempted", "ended"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a lane, as a policy sees it: a branch to start, or a thread that goes on after its join.

    plan: number of its plan, in order of arrival
    path_tokens: tokens it may decode on its longest chain
    order: of its fork, or of its return, among all; index: its place among its siblings
    siblings: branches of its fork that wait, itself included; 1 for a thread that goes on
    resumed: it has run before
    """

    plan: int
    path_tokens: int
    order: int
    index: int
    siblings: int
    resumed: bool


class Policy:
    """Who gets a lane, and who is preempted. Override what should be otherwise.

    The rules of pages and of dependency hold whatever a policy says. A policy that holds everything back leaves the
    run stuck.
    """

    def rank(self, waiting: Waiting) -> tuple[int, ...]:
        """The least gets the next free lane. Here: who has run before, then first come first served, longest path."""
        return (not waiting.resumed, waiting.plan, -waiting.path_tokens, waiting.order, waiting.index)

    def holds_back(self, waiting: Waiting, free_lanes: int) -> bool:
        """Whether it goes on waiting although `free_lanes` are free; it is asked again before the next step."""
        return False

    def expects(self, need: Need) -> int:
        """Pages that a guest is expected to need. Half its worst case is a choice: at all of it few guests start."""
        return max(1, ceil(need.peak / 2))

    def victim(self, guests: Sequence[Thread]) -> Thread:
        """Which of `guests`, in order of their admission, is preempted."""
        return guests[-1]


class Thread:
    """A thread as the scheduler sees it. `index` is the branch index in its fork (or the plan's number)."""

    __slots__ = (
        "carried", "charge", "draw", "feed", "forks", "group", "guest", "index", "need", "order", "parent",
        "path_tokens", "plan", "state",
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
        self.guest = False
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
        "returning",
        "starts",
        "takes_guests",
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
        self.returning: deque[Thread] = deque()
        self.extra = 0
        self.wide = False
        self.takes_guests = True
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

    def __init__(self, machine: Machine, policy: Policy | None = None, room: Callable[[], int] | None = None) -> None:
        """room: pages that are free in fact, less those that guests are still expected to take; no guests if None"""
        self.machine = machine
        self.policy = policy or Policy()
        self.reserved = 0
        self._room = room
        self._plans = 0
        self._orders = 0
        self._entries = 0
        self._queue: list[tuple[int, Thread]] = []
        self._waiting: list[tuple[tuple[int, ...], int, Waiting, Thread | Fork]] = []
        self._short: list[Fork] = []
        self._seated: list[Thread] = []
        self._guests: list[Thread] = []
        self._released = False

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
        self._promote_guests()
        held_back = []
        while len(self._seated) < lanes and self._waiting:
            entry = heappop(self._waiting)
            waits = entry[-1]
            if not _still_waits(waits):
                if isinstance(waits, Fork):
                    waits.queued = False
            elif self.policy.holds_back(entry[2], lanes - len(self._seated)):
                held_back.append(entry)
            elif isinstance(waits, Thread):
                seated.append(self._sit(waits))
            else:
                waits.queued = False
                child = self._start_child(waits)
                if child is None:
                    self._short.append(waits)
                else:
                    seated.append(self._sit(child))
                    self._offer(waits)
        for entry in held_back:
            heappush(self._waiting, entry)
        while len(self._seated) < lanes and self._queue:
            thread = self._queue[0][-1]
            if thread.state != "ended":
                if not self._reserve(thread):
                    if thread.state != "pending" or not self._has_room(thread.need):
                        break
                    self._admit_guest(thread)
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
        if thread.guest:
            self._guests.remove(thread)
            thread.guest = False
        fork = thread.group
        if thread.state == "preempted" and fork is not None:
            fork.returning.remove(thread)
        thread.state = "ended"
        thread.feed = thread.draw = 0
        if fork is None:
            self.reserved -= thread.charge
            thread.charge = 0
            self._retry()
            return
        fork.active.pop(thread.index, None)
        if thread.carried:
            fork.carrier = None
            self._retry()
        else:
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
        self._come_back(parent)

    def promote(self, thread: Thread) -> bool:
        """A seated thread without work wants to fork, which takes a reservation. If it gets none now, it parks.

        A parked thread is seated again by a later `start`, with its need reserved.
        """
        if not thread.guest or self._reserve(thread):
            return True
        self._leave(thread)
        thread.state = "parked"
        return False

    def victim(self) -> Thread:
        """The guest that is to be preempted next. Raises RuntimeError if there is none."""
        if not self._guests:
            raise RuntimeError("the pool ran out under what was reserved")
        return self.policy.victim(tuple(self._guests))

    def preempt(self, thread: Thread, *, feed: int) -> None:
        """A guest gives up its pages, and its lane if it has one. feed: rows it has to feed when it is back."""
        if not thread.guest:
            raise ValueError(f"only a guest is preempted: {thread}")
        self._leave(thread)
        self._guests.remove(thread)
        thread.guest = False
        thread.state = "preempted"
        thread.feed = feed
        fork = thread.group
        if fork is None:
            heappush(self._queue, (thread.plan, thread))
        else:
            fork.returning.append(thread)
            self._offer(fork)

    @property
    def has_waiting(self) -> bool:
        """Whether something could start or go on but for pages, for a lane, or for the policy."""
        if any(_still_waits(waits) for waits in (*self._short, *(entry[-1] for entry in self._waiting))):
            return True
        if any(guest.state == "parked" for guest in self._guests):
            return True
        return any(thread.state != "ended" for _, thread in self._queue)

    @property
    def seated(self) -> Sequence[Thread]:
        """The threads that hold a lane."""
        return self._seated

    @property
    def guests(self) -> Sequence[Thread]:
        """The threads that run, or are parked, with nothing reserved; in order of their admission."""
        return self._guests

    @property
    def idle(self) -> bool:
        """Nothing is seated and nothing could be: all plans are over, or something outside must happen first."""
        return not self._seated and not self._guests and not self.has_waiting

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
        # Guests run in any order, which needs that what they keep is reserved, or is the same for all.
        fork.takes_guests = fork.wide or len({c.need for c in children}) == 1
        if fork.takes_guests:
            if len({c.path_tokens for c in children}) > 1:
                fork.starts = sorted(range(len(children)), key=lambda i: (-children[i].path_tokens, i))
        else:
            fork.starts = sorted(range(len(children)), key=lambda i: (children[i].need.kept - children[i].need.peak, i))

    def _offer(self, fork: Fork) -> None:
        if fork.queued or not _still_waits(fork):
            return
        if fork.returning:
            thread = fork.returning[0]
            path_tokens, index, resumed = thread.path_tokens, thread.index, True
        else:
            if fork.limit is not None and len(fork.active) >= fork.limit:
                return
            path_tokens, index, resumed = fork.children[fork.starts[fork.next]].path_tokens, fork.next, False
        fork.queued = True
        siblings = fork.pending + len(fork.returning)
        self._wait(Waiting(fork.parent.plan, path_tokens, fork.order, index, siblings, resumed), fork)

    def _come_back(self, thread: Thread) -> None:
        thread.state = "ready"
        thread.order = self._orders
        self._orders += 1
        self._wait(Waiting(thread.plan, thread.path_tokens, thread.order, thread.index, 1, True), thread)

    def _wait(self, waiting: Waiting, waits: Thread | Fork) -> None:
        self._entries += 1
        heappush(self._waiting, (self.policy.rank(waiting), self._entries, waiting, waits))

    def _start_child(self, fork: Fork) -> Thread | None:
        """The next child of `fork`, its pages provided for; None if they are not there."""
        if fork.returning:
            thread = fork.returning[0]
            if not self._reserve(thread):
                return None
            fork.returning.popleft()
            return thread
        index = fork.starts[fork.next]
        child = fork.children[index]
        thread = Thread(fork.parent.plan, fork.parent, fork, index, child)
        if not self._reserve(thread):
            if not fork.takes_guests or not self._has_room(child.need):
                return None
            self._admit_guest(thread)
        fork.next += 1
        fork.active[index] = thread
        return thread

    def _reserve(self, thread: Thread) -> bool:
        """Reserve what a thread needs, if that is to be had; it is no guest then."""
        fork = thread.group
        if fork is None:
            if any(first < thread.plan for first in self._without_reservation()):
                return False  # an earlier plan has waited for longer
            charge = thread.need.peak
        elif fork.carrier is None:
            thread.carried = True
            fork.carrier = thread
            charge = 0
        else:
            charge = thread.need.peak - thread.need.kept if fork.wide else thread.need.peak
        if self.reserved + charge > self.machine.pages:
            return False
        thread.charge = charge
        self.reserved += charge
        if thread.guest:
            self._guests.remove(thread)
            thread.guest = False
        return True

    def _without_reservation(self) -> Iterator[int]:
        """The first plan of those that have not started, and those whose own threads are guests."""
        while self._queue and self._queue[0][-1].state == "ended":
            heappop(self._queue)
        yield from (plan for plan, _ in self._queue[:1])
        yield from (thread.plan for thread in self._guests if thread.group is None)

    def _has_room(self, need: Need) -> bool:
        return self._room is not None and self._room() >= self.policy.expects(need)

    def _admit_guest(self, thread: Thread) -> None:
        thread.guest = True
        self._guests.append(thread)

    def _promote_guests(self) -> None:
        """Reserve for guests what has become free, the first admitted first; parked ones go on."""
        if not self._released:
            return
        self._released = False
        for thread in tuple(self._guests):
            if self._reserve(thread) and thread.state == "parked":
                self._come_back(thread)

    def _retry(self) -> None:
        self._released = True
        short, self._short = self._short, []
        for fork in short:
            self._offer(fork)


def _still_waits(waits: Thread | Fork) -> bool:
    if isinstance(waits, Thread):
        return waits.state == "ready"
    return not waits.closed and bool(waits.pending or waits.returning)
