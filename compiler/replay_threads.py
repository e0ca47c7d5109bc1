"""Threads and open forks of a replayed schedule: what is known of each."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, TypeAlias

from anabranch.compiler.graph import Call, Cond, Fork, Loop, Map, Node, PlanGraph, Reduce, Region
from anabranch.compiler.replay_views import Segment, View
from anabranch.compiler.schedule import Ref
from anabranch.dsl.spec import JoinSpec, Limits

# What is known of an unfed token: it stands in the plan's text, it may be or is text that the run generated, it was
# drawn, or it was fed and lost.
LITERAL: Final = 0
KNOWN: Final = 1
GENERATED: Final = 2
DRAWN: Final = 3
LOST: Final = 4

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
            if kind in (DRAWN, LOST) or tuple(run[: len(part)]) != tuple(part):
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
    wrote: known tokens, since it came to its node
    must_seal: its last row was flushed; must_go_on: it was a drawn token, fed so that it can go on
    pinned: it ended ok, and its join, not yet read, may stitch it
    decoded: tokens drawn in it and in its branches that ended; path: on the longest chain to where it is
    rank: tokens drawn in it and in those of its branches that joins read, which orders ends where time must not
    """

    __slots__ = (
        "attempt", "decoded", "depth", "drawn", "drew", "ended_at", "expects", "fork", "forked", "frames", "fresh",
        "gained", "index", "live", "logits_at", "lost", "must_go_on", "must_seal", "node", "number", "parent", "path",
        "path_tokens", "pinned", "plan", "position", "rank", "reduced", "run", "seat", "segment", "status", "stitching",
        "unfed", "view", "watchers", "wrote",
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
        self.must_seal = self.must_go_on = self.wrote = False
        self.logits_at: int | None = None
        self.gained: list[tuple[Segment, int]] = []
        self.status: str | None = None
        self.live = self.watchers = 0
        self.pinned = False
        self.frames = [Frame(region, None)]
        self.node: Node | None = None
        self.expects = ""
        self.drawn = self.decoded = self.rank = self.path_tokens = 0
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
        "before", "closed", "decoded", "join", "last", "limits", "live", "node", "ranks", "ref", "spent", "starts",
        "width",
    )  # fmt: skip

    def __init__(self, node: Split, ref: Ref, width: int, before: int) -> None:
        self.node = node
        self.ref = ref
        self.width = width
        self.before = before
        self.limits = node.limits
        self.join = join_of(node)
        self.last: dict[int, Thread] = {}
        self.spent: dict[int, int] = {}
        self.ranks: dict[int, int] = {}
        self.live = self.decoded = 0
        self.closed = False
        self.starts = list(accumulate(arm.multiplicity for arm in node.arms)) if isinstance(node, Fork) else []

    @property
    def startable(self) -> int:
        """Branches that have not begun and may."""
        left = 0 if self.closed else self.width - len(self.last)
        return left if self.limits.limit is None else min(left, max(0, self.limits.limit - self.live))

    @property
    def all_fresh(self) -> bool:
        """Whether no branch sees what its parent sees."""
        arms = self.node.arms if isinstance(self.node, Fork) else ()
        return self.limits.fresh or (bool(arms) and all(arm.limits.fresh for arm in arms))

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
