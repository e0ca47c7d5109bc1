"""Threads of a replayed schedule, and how they walk their plan's graph: nodes, rounds, arms, forks and joins.

What only values decide is taken as it is: which arm of a condition, how many rounds of a loop with `until`, how wide a
fork under `upto` is, which branch a vote chose.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final, TypeAlias

from anabranch.compiler.graph import (
    Call,
    Cond,
    Decode,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    Node,
    PlanGraph,
    Reduce,
    Region,
    Return,
)
from anabranch.compiler.replay_rules import fault
from anabranch.compiler.replay_views import Segment, View
from anabranch.compiler.schedule import Ref
from anabranch.dsl.spec import ChoiceType, JoinSpec, Limits

KNOWN: Final = 0
DRAWN: Final = 1
LOST: Final = 2

Split: TypeAlias = Fork | Map | Reduce | Call


class Unfed:
    """A thread's tokens that are not fed yet, in order, as runs of one kind."""

    __slots__ = ("_runs", "size")

    def __init__(self) -> None:
        self._runs: deque[tuple[int, Sequence[int]]] = deque()
        self.size = 0

    def push(self, kind: int, ids: Sequence[int]) -> None:
        if ids:
            self._runs.append((kind, ids))
            self.size += len(ids)

    def push_front(self, kind: int, ids: Sequence[int]) -> None:
        if ids:
            self._runs.appendleft((kind, ids))
            self.size += len(ids)

    def take(self, count: int) -> Iterator[tuple[int, Sequence[int]]]:
        """The next `count` tokens, as runs; there are so many."""
        self.size -= count
        while count:
            kind, ids = self._runs.popleft()
            if len(ids) > count:
                self._runs.appendleft((kind, ids[count:]))
                ids = ids[:count]
            count -= len(ids)
            yield kind, ids

    def drop(self, count: int) -> None:
        """Forget the last `count`; there are so many."""
        self.size -= count
        while count:
            kind, ids = self._runs.pop()
            if len(ids) > count:
                self._runs.append((kind, ids[: len(ids) - count]))
                return
            count -= len(ids)

    def begins_with(self, ids: Sequence[int]) -> bool:
        """Whether the next tokens are known ones, and these."""
        at = 0
        for kind, run in self._runs:
            if at == len(ids):
                break
            part = ids[at : at + len(run)]
            if kind != KNOWN or tuple(run[: len(part)]) != tuple(part):
                return False
            at += len(part)
        return at == len(ids)


class Frame:
    """A region on its way. owner: the loop or condition that it stands in; number: the round."""

    __slots__ = ("number", "owner", "place", "region")

    def __init__(self, region: Region, owner: Loop | Cond | None) -> None:
        self.region = region
        self.owner = owner
        self.place = 0
        self.number = -1


class Thread:
    """A context and its place in its plan.

    position: of its next token; the unfed ones come before it
    gained: segments that entered its view since it began, with their shifts
    logits_at: the position after the token whose logits are at hand, if any are
    watchers: branches that see what it sees, and run or have such branches themselves
    pinned: it ended ok, and its join, not yet read, may stitch it
    decoded: tokens drawn in it and in its branches that ended; path: on the longest chain to where it is
    """

    __slots__ = (
        "attempt", "decoded", "depth", "drawn", "drew", "ended_at", "expects", "fork", "forked", "frames", "fresh",
        "gained", "index", "live", "logits_at", "lost", "must_seal", "node", "number", "parent", "path",
        "path_tokens", "pinned", "plan", "position", "reduced", "run", "seat", "segment", "status", "stitching",
        "unfed", "view", "watchers",
    )  # fmt: skip

    def __init__(self, number: int, run: int, path: tuple[str, ...], plan: PlanGraph, region: Region) -> None:
        self.number = number
        self.run = run
        self.path = path
        self.plan = plan
        self.parent: Thread | None = None
        self.fork: Branches | None = None
        self.index = self.attempt = self.depth = 0
        self.fresh = True
        self.view: View | None = None
        self.segment: Segment | None = None
        self.position = 0
        self.unfed = Unfed()
        self.lost = 0
        self.must_seal = False
        self.logits_at: int | None = None
        self.gained: list[tuple[Segment, int]] = []
        self.status: str | None = None
        self.live = self.watchers = 0
        self.pinned = False
        self.frames = [Frame(region, None)]
        self.node: Node | None = None
        self.expects = ""
        self.drawn = self.decoded = self.path_tokens = 0
        self.forked: Branches | None = None
        self.reduced: frozenset[int] | None = None
        self.stitching: tuple[Thread, ...] = ()
        self.seat = self.drew = self.ended_at = -1

    @property
    def fed(self) -> int:
        """The position of the next token that it feeds."""
        return self.position - self.unfed.size

    @property
    def here(self) -> tuple[str, ...]:
        """Its path, with the rounds of the loops that it is in."""
        rounds = (f"{f.owner.site}[{f.number}]" for f in self.frames if isinstance(f.owner, Loop))
        return (*self.path, *rounds)

    def sees(self) -> bool:
        """Whether what it sees is needed: by itself, by a branch, or by a join that may stitch it."""
        waited_for = self.pinned and self.parent is not None and self.parent.status is None
        return self.status is None or self.watchers > 0 or waited_for

    def __str__(self) -> str:
        return f"thread {self.number}"


class Branches:
    """A fork that is open. last: each branch's last attempt, by index; live: attempts that run; closed: it was read.

    before: branches of earlier levels, in a `reduce`
    """

    __slots__ = (
        "before",
        "closed",
        "decoded",
        "join",
        "last",
        "limits",
        "live",
        "node",
        "ref",
        "spent",
        "starts",
        "width",
    )

    def __init__(self, node: Split, ref: Ref, width: int, before: int) -> None:
        self.node = node
        self.ref = ref
        self.width = width
        self.before = before
        self.limits = node.limits
        self.join = join_of(node)
        self.last: dict[int, Thread] = {}
        self.spent: dict[int, int] = {}
        self.live = self.decoded = 0
        self.closed = False
        self.starts = list(accumulate(arm.multiplicity for arm in node.arms)) if isinstance(node, Fork) else []

    @property
    def stitches(self) -> bool:
        return self.join.context == "stitch"

    def arm(self, index: int) -> tuple[Region | None, str | None, Limits]:
        """A branch's region (None: another plan's), label and own limits."""
        match self.node:
            case Fork(arms=arms):
                arm = arms[0] if self.node.width is not None else arms[bisect_right(self.starts, index)]
                return arm.region, arm.label, arm.limits
            case Map(region=region) | Reduce(region=region):
                return region, None, Limits()
            case Call():
                return None, None, Limits()

    def retry(self, index: int) -> int:
        return max(self.limits.retry, self.arm(index)[2].retry)


def join_of(node: Split) -> JoinSpec:
    """A call is a fork of one that must succeed; each level of a `reduce` reads all its branches."""
    match node:
        case Fork(join=join) | Map(join=join):
            return join
        case Call():
            return JoinSpec("first", 1)
        case Reduce():
            return JoinSpec()


# --- nodes


def enter(thread: Thread, ref: Ref) -> None:
    """The thread comes to a node."""
    if thread.expects:
        fault("in-order", f"{thread} comes to {ref} where {thread.expects} must come")
    _leave_node(thread)
    if ref[0] != thread.plan.name:
        fault("in-order", f"{thread} runs `{thread.plan.name}` and comes to a node of `{ref[0]}`")
    while True:
        frame = thread.frames[-1]
        node = _next_node(frame)
        if node is not None:
            break
        _leave_region(thread, f"comes to {ref}")
    if isinstance(node, Return):
        fault("in-order", f"{thread} comes to {ref} after a `return`")
    if isinstance(node, Let | Need) or node.dst != ref[1]:
        fault("in-order", f"{thread} comes to {ref}, and `{node.site}` is next")
    frame.place += 1
    thread.node, thread.forked = node, None
    thread.drawn = 0
    match node:
        case Loop():
            thread.expects = "a round"
        case Cond():
            thread.expects = "an arm"
        case Reduce():
            thread.reduced = None
        case _:
            pass


def begin_round(thread: Thread, ref: Ref, number: int) -> None:
    """The thread begins a round of a loop."""
    if thread.expects == "a round":
        node = thread.node
        if not isinstance(node, Loop) or ref != (thread.plan.name, node.dst) or number != 0:
            fault("rounds-of-the-loop", f"{thread} begins round {number} of {ref} where the first of another must come")
        frame = Frame(node.region, node)
        frame.number = 0
        thread.frames.append(frame)
        thread.expects = ""
        return
    if thread.expects:
        fault("rounds-of-the-loop", f"{thread} begins a round where {thread.expects} must come")
    _leave_node(thread)
    while thread.frames[-1].owner is not None and _next_node(thread.frames[-1]) is None:
        frame = thread.frames[-1]
        if isinstance(frame.owner, Loop) and ref == (thread.plan.name, frame.owner.dst):
            if number != frame.number + 1 or number >= frame.owner.rounds:
                fault(
                    "rounds-of-the-loop",
                    f"{thread} begins round {number} after round {frame.number}, and there are {frame.owner.rounds}",
                )
            frame.number, frame.place, thread.node = number, 0, None
            return
        _leave_region(thread, f"begins a round of {ref}")
    fault("rounds-of-the-loop", f"{thread} begins a round of {ref}, and stands at no end of its body")


def take_arm(thread: Thread, ref: Ref, place: int) -> None:
    """The thread takes an arm of the condition that it came to."""
    node = thread.node
    if thread.expects != "an arm" or not isinstance(node, Cond) or ref != (thread.plan.name, node.dst):
        fault("in-order", f"{thread} takes an arm of {ref}, which it did not just come to")
    arm = {0: node.then, 1: node.orelse}.get(place)
    if arm is None and (place != -1 or node.orelse is not None):
        fault("in-order", f"{ref} has no arm {place}")
    if arm is not None:
        thread.frames.append(Frame(arm, node))
    thread.expects, thread.node = "", None


def at_end(thread: Thread) -> bool:
    """Whether the thread stands at a `return` or at the end of its region."""
    if thread.expects or not _may_leave_node(thread):
        return False
    for frame in reversed(thread.frames):
        node = _next_node(frame)
        if node is not None:
            return isinstance(node, Return)
        if isinstance(frame.owner, Loop) and not _may_leave_loop(frame):
            return False
    return True


def _next_node(frame: Frame) -> Node | None:
    nodes = frame.region.nodes
    while frame.place < len(nodes):
        node = nodes[frame.place]
        if not isinstance(node, Let | Need):
            return node
        frame.place += 1
    return None


def _leave_region(thread: Thread, what: str) -> None:
    frame = thread.frames[-1]
    if frame.owner is None:
        fault("in-order", f"{thread} {what} after the end of its text")
    if isinstance(frame.owner, Loop) and not _may_leave_loop(frame):
        fault("rounds-of-the-loop", f"{thread} {what} after {frame.number + 1} of {frame.owner.rounds} rounds")
    thread.frames.pop()


def _may_leave_loop(frame: Frame) -> bool:
    owner = frame.owner
    return not isinstance(owner, Loop) or owner.until is not None or frame.number + 1 == owner.rounds


def _leave_node(thread: Thread) -> None:
    if not _may_leave_node(thread):
        site = thread.node.site if thread.node is not None else ""
        fault("waits-for-its-branches", f"{thread} goes on from `{site}` before it has done with its branches")


def _may_leave_node(thread: Thread) -> bool:
    node = thread.node
    match node:
        case Fork() | Map() | Call():
            return thread.forked is not None and thread.forked.closed
        case Reduce(most=most):
            # Of one item, or none left to merge, it forks no more; a level that failed may have a fallback.
            if thread.reduced is None:
                return True
            failed = thread.forked is not None and thread.forked.closed and not thread.reduced
            return failed or 1 in thread.reduced or most < 1
        case _:
            return True


def may_draw(thread: Thread) -> int:
    """How many tokens the thread may still draw at its node."""
    node = thread.node
    if not isinstance(node, Decode) or node.spec.recorded is not None:
        return 0
    if isinstance(node.spec.type, ChoiceType) and node.spec.type.by == "logprob":
        return 0
    return node.spec.max_tokens - thread.drawn


# --- forks


def fork(thread: Thread, ref: Ref, width: int) -> None:
    """The thread waits for branches."""
    node = thread.node
    if not isinstance(node, Fork | Map | Reduce | Call) or ref != (thread.plan.name, node.dst):
        fault("waits-for-its-branches", f"{thread} forks at {ref}, which it did not just come to")
    before = 0
    if thread.forked is not None and thread.forked.node is node:
        if not isinstance(node, Reduce) or not thread.forked.closed:
            fault("waits-for-its-branches", f"{thread} forks twice at {ref}")
        before = thread.forked.before + thread.forked.width
    match node:
        case Fork(arms=arms, width=dynamic):
            most = sum(arm.multiplicity for arm in arms)
            least = most if dynamic is None else 0
        case Map(most=most):
            least = 0
        case Call():
            least = most = 1
        case Reduce(most=items):
            left = merges(width, node.by, thread.reduced, items)
            if width < 1 or not left:
                fault("waits-for-its-branches", f"a level of `{node.site}` cannot merge {width} groups here")
            thread.reduced = left
            least, most = 1, width
    if not least <= width <= most:
        fault("waits-for-its-branches", f"`{node.site}` has {least} to {most} branches, and {thread} waits for {width}")
    thread.forked = Branches(node, ref, width, before)


def merges(width: int, by: int, items: frozenset[int] | None, most: int) -> frozenset[int]:
    """How many items there can be after a level of a `reduce` that merged `width` groups.

    items: how many there could be before it; None for any up to `most`
    """
    # The last group may be a single item, which is not merged.
    found = set()
    for groups, low, high in ((width, (width - 1) * by + 2, width * by), (width + 1, width * by + 1, width * by + 1)):
        if low <= most if items is None else any(low <= count <= high for count in items):
            found.add(groups)
    return frozenset(found)


def begin_branch(
    graph: Graph, number: int, parent: Thread, ref: Ref, index: int, path: tuple[str, ...], fresh: bool
) -> Thread:
    """A branch, or a further attempt of one, of the fork that `parent` waits at."""
    branches = parent.forked
    if parent.status is not None or branches is None or branches.closed or branches.ref != ref:
        fault("branch-once", f"thread {number} begins at {ref}, and {parent} does not wait there")
    first = branches.before if isinstance(branches.node, Reduce) else 0
    if not 0 <= index < branches.width:
        fault("branch-once", f"thread {number} is branch {index} of {branches.width}")
    region, label, limits = branches.arm(index)
    before = branches.last.get(index)
    attempt = 0
    if before is not None:
        attempt = before.attempt + 1
        if before.status != "failed" or attempt > branches.retry(index):
            fault("branch-once", f"branch {index} of {ref} begins again after it ended {before.status}")
    key = str(first + index) if label is None else label
    expected = (*parent.here, f"{branches.node.site}[{key}]" + (f"~{attempt}" if attempt else ""))
    if path != expected:
        fault("path-of-the-branch", f"thread {number} has the path {path}, and branch {index} of {ref} {expected}")
    if fresh != (branches.limits.fresh or limits.fresh):
        fault("branch-once", f"thread {number} is {'' if fresh else 'not '}fresh, and its branch is otherwise")
    plan, depth = parent.plan, parent.depth
    if region is None:
        assert isinstance(branches.node, Call)
        plan = graph.plans[branches.node.plan]
        region = plan.region
        depth = depth + 1 if plan is parent.plan else 0
        if depth > plan.depth:
            fault("branch-once", f"`{plan.name}` calls itself {depth} times, and permits {plan.depth}")
    branches.live += 1
    if branches.limits.limit is not None and branches.live > branches.limits.limit:
        fault(
            "limit-of-the-fork",
            f"{branches.live} branches of {ref} run at once, and `limit` is {branches.limits.limit}",
        )
    thread = Thread(number, parent.run, path, plan, region)
    thread.parent, thread.fork, thread.index, thread.attempt = parent, branches, index, attempt
    thread.fresh, thread.depth = fresh, depth
    thread.path_tokens = parent.path_tokens if before is None else before.path_tokens
    branches.last[index] = thread
    parent.live += 1
    return thread


def end_branch(thread: Thread) -> None:
    """Account for a thread that has just ended in the fork that it is a branch of."""
    branches, parent = thread.fork, thread.parent
    budget = thread.plan.limits.budget if thread.parent is None or thread.plan is not thread.parent.plan else None
    if isinstance(branches.node if branches else None, Call):
        budget = thread.plan.limits.budget
    if budget is not None and thread.decoded > budget:
        fault("budget-kept", f"{thread} drew {thread.decoded} tokens, and `{thread.plan.name}` permits {budget}")
    if branches is None or parent is None:
        return
    branches.live -= 1
    parent.live -= 1
    branches.decoded += thread.decoded
    parent.decoded += thread.decoded
    spent = branches.spent.get(thread.index, 0) + thread.decoded
    branches.spent[thread.index] = spent
    own = branches.arm(thread.index)[2].budget
    if own is not None and spent > own:
        fault("budget-kept", f"branch {thread.index} of {branches.ref} drew {spent} tokens, and may draw {own}")
    whole = branches.limits.budget
    if whole is not None and branches.decoded > whole:
        fault("budget-kept", f"the branches of {branches.ref} drew {branches.decoded} tokens, and may draw {whole}")


# --- joins


def join(thread: Thread, ref: Ref, ok: tuple[int, ...], winners: tuple[int, ...], failed: bool, ordered: bool) -> None:
    """The thread reads a join. ordered: branches count in order of (tokens decoded, index)."""
    branches = thread.forked
    if branches is None or branches.closed or branches.ref != ref:
        fault("waits-for-its-branches", f"{thread} reads the join of {ref}, where it does not wait")
    _check_ok(branches, ok, ordered)
    _check_closed(branches, len(ok))
    _check_verdict(branches, ok, failed)
    _check_winners(branches, ok, winners, failed)
    branches.closed = True
    longest = max((last.path_tokens for last in branches.last.values()), default=0)
    thread.path_tokens = max(thread.path_tokens, longest)
    chosen = set(winners)
    for index, last in branches.last.items():
        if index not in chosen or not branches.stitches:
            last.pinned = False
    if branches.stitches:
        thread.stitching = tuple(branches.last[index] for index in winners)
    if failed and isinstance(branches.node, Reduce):
        thread.reduced = frozenset()


def _check_ok(branches: Branches, ok: tuple[int, ...], ordered: bool) -> None:
    if any(a >= b for a, b in pairwise(ok)):
        fault("winners-of-the-join", f"the branches {ok} of {branches.ref} do not ascend")
    ended = {index for index, last in branches.last.items() if last.status == "ok"}
    read = set(ok)
    if not read <= ended:
        fault("winners-of-the-join", f"branches {sorted(read - ended)} of {branches.ref} are read, and did not end ok")
    if read == ended:
        return
    if branches.join.kind not in ("first", "quorum"):
        fault("winners-of-the-join", f"branches {sorted(ended - read)} of {branches.ref} ended ok, and are not read")
    last_read = max((_order(branches, index, ordered) for index in read), default=(-1, -1))
    left = min(ended - read, key=lambda index: _order(branches, index, ordered))
    if _order(branches, left, ordered) < last_read:
        fault("order-of-ends", f"branches {ok} of {branches.ref} are read, and branch {left} ended before")


def _order(branches: Branches, index: int, ordered: bool) -> tuple[int, int]:
    if ordered:
        return branches.spent.get(index, 0), index
    # Those that ended after the same call have no order.
    return branches.last[index].ended_at, 0


def _check_closed(branches: Branches, num_ok: int) -> None:
    """Whether the join may be read now. Branches that lose may have been cancelled for it already."""
    join, ref = branches.join, branches.ref
    running, lost, late = 0, 0, 0
    for index, last in branches.last.items():
        if last.status is None:
            running += 1
        elif last.status == "failed" and last.attempt < branches.retry(index):
            continue
        elif last.status in ("failed", "truncated", "late"):
            lost += 1
            late += last.status == "late"
    has_deadline = branches.limits.deadline_s is not None
    if late and not has_deadline:
        fault("joined-when-permitted", f"branches of {ref} ended late, which has no deadline")
    # Those that run, have yet to start, or were cancelled.
    rest = branches.width - num_ok - lost
    if rest == 0 or (has_deadline and not running):
        return
    match join.kind:
        case "first":
            done = num_ok >= (join.count or 0) or num_ok + rest < (join.count or 0)
        case "quorum":
            done = num_ok >= (join.count or 0) or min(num_ok, 1) + rest < (join.count or 0)
        case _:
            done = False
    if not done:
        fault(
            "joined-when-permitted", f"the join of {ref} is read while {rest} of {branches.width} branches are not over"
        )


def _check_verdict(branches: Branches, ok: tuple[int, ...], failed: bool) -> None:
    join = branches.join
    match join.kind:
        case "all":
            needs = branches.width if join.count is None else join.count
        case "first" | "quorum":
            needs = join.count or 0
        case _:
            needs = 1
    if not failed and len(ok) < needs:
        fault("joined-when-permitted", f"the join of {branches.ref} needs {needs} branches and yields of {len(ok)}")
    by_values = join.kind in ("quorum", "best") or (join.kind == "vote" and join.by == "number")
    if failed and len(ok) >= needs and not by_values:
        fault("joined-when-permitted", f"the join of {branches.ref} needs {needs} branches and fails with {len(ok)}")


def _check_winners(branches: Branches, ok: tuple[int, ...], winners: tuple[int, ...], failed: bool) -> None:
    join = branches.join
    if failed or join.context == "drop":
        expected: int | None = 0
    elif join.kind == "first":
        expected = join.count
    elif join.kind == "all" or join.context == "text":
        expected = len(ok)
    else:
        expected = 1
    ascending = all(a < b for a, b in pairwise(winners))
    if len(winners) != expected or not ascending or not set(winners) <= set(ok):
        fault(
            "winners-of-the-join",
            f"the winners of {branches.ref} are {winners}, and must be {expected} of {ok} in ascending order",
        )
