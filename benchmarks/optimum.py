"""The fewest calls in which plans can run at all, by search: what the scheduler is measured against.

In the model: fork-join trees, nested, several forks in a row; joins that wait for all; every length known beforehand;
at most `lanes` threads in a call; rows of known text under `chunk`, split among the threads in any way; the first token
with the last row. Not in it: pages, `limit=`, joins that close early.

Two rules for lanes. With `hand_over` a call may take any threads that can run, whoever had a lane in the call before:
no schedule of any kind takes fewer calls. Without, a thread that has begun keeps its lane until it ends or forks, which
is what the scheduler does; leaving a lane idle on purpose is allowed, since it may pay.

The search asks whether a number of calls is enough, from a lower bound upwards: depth first over what each call can do.
States are made equal under swaps of equal siblings, those known to fail are kept, and two bounds cut: what stands at a
distance of h from the end has to be done h calls before it, on the lanes (Hu 1961) and in the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

from forktrees import Branch, Fork, Item, Work, chain

from anabranch.compiler.scheduler import Machine

# A thread: (rest, feed, draw, held, inner)
#   rest: number of what follows the item that it is in; feed, draw: what is left of its work
#   held: 1 where it holds a lane that it keeps; inner: its branches in a fork, in order
State: TypeAlias = "tuple[int, int, int, int, tuple[State, ...]]"
States: TypeAlias = "tuple[State, ...]"


class Unsolved(Exception):
    """The search was cut off. lower: calls that are known to be needed."""

    def __init__(self, lower: int) -> None:
        super().__init__(f"cut off: at least {lower} calls")
        self.lower = lower


def optimum(
    plans: Sequence[Branch], machine: Machine, *, hand_over: bool, least: int = 0, upper: int, most_states: int
) -> int:
    """The fewest calls for `plans` on `machine`.

    least: calls known to be needed; upper: calls known to be enough
    Raises Unsolved after `most_states` states.
    """
    search = Search(machine, hand_over, most_states)
    states = tuple(sorted(search.enter(plan.items, 0) for plan in plans))
    begin = tuple(state for entered in states for state in entered)
    for calls in range(max(least, search.bound(begin)), upper):
        try:
            if search.enough(begin, calls):
                return calls
        except _CutOff:
            raise Unsolved(calls) from None
    return upper


class _CutOff(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Rest:
    """Items to come. steps: calls on their chain; works: (steps, rows, calls after it up to their end) of each work."""

    items: tuple[Item, ...]
    steps: int
    feeds: bool
    works: tuple[tuple[int, int, int], ...]


class Search:
    """One search. Where a thread goes on it is a tuple of one state, and where it ends an empty one."""

    def __init__(self, machine: Machine, hand_over: bool, most_states: int) -> None:
        self.lanes = machine.lanes
        self.chunk = machine.chunk
        self.hand_over = hand_over
        self.left = most_states
        self.rests: list[_Rest] = []
        self.numbers: dict[tuple[Item, ...], int] = {}
        self.failed: dict[States, int] = {}

    def number(self, items: tuple[Item, ...]) -> int:
        found = self.numbers.get(items)
        if found is None:
            works = tuple(self.works(items, 0))
            rest = _Rest(items, chain(Branch(items), self.chunk), any(rows for _, rows, _ in works), works)
            found = self.numbers[items] = len(self.rests)
            self.rests.append(rest)
        return found

    def works(self, items: Sequence[Item], after: int) -> Iterator[tuple[int, int, int]]:
        for item in reversed(items):
            match item:
                case Work():
                    yield item.steps(self.chunk), item.feed, after
                    after += item.steps(self.chunk)
                case Fork():
                    for branch in item.branches:
                        yield from self.works(branch.items, after)
                    after += max(chain(branch, self.chunk) for branch in item.branches)

    def enter(self, items: tuple[Item, ...], held: int) -> States:
        """A thread that goes on with `items`."""
        for place, item in enumerate(items):
            rest = items[place + 1 :]
            match item:
                case Work():
                    return ((self.number(rest), item.feed, item.draw, 0 if self.hand_over else held, ()),)
                case Fork():
                    inner = [state for branch in item.branches for state in self.enter(branch.items, 0)]
                    if inner:
                        return ((self.number(rest), 0, 0, 0, tuple(sorted(inner))),)
                    held = 0
        return ()

    def bound(self, states: States) -> int:
        """Calls that `states` need at least."""
        works: list[tuple[int, int, int]] = []
        longest = max((self.gather(state, 0, works) for state in states), default=0)
        lanes, chunk = self.lanes, self.chunk
        # units[h], rows[h]: what has exactly h calls after it.
        units, rows = [0] * (longest + 1), [0] * (longest + 1)
        for steps, fed, after in works:
            units[after] += 1
            units[after + steps] -= 1
            if fed:
                rows[after + steps - -(-fed // chunk)] += fed
        for level in range(1, longest + 1):
            units[level] += units[level - 1]
        needed, above, fed = longest, 0, 0
        for level in range(longest, -1, -1):
            above += units[level]
            fed += rows[level]
            needed = max(needed, level - (-above // lanes), level - (-fed // chunk))
        return needed

    def gather(self, state: State, after: int, works: list[tuple[int, int, int]]) -> int:
        """Add what is left of a thread to `works`. Returns the calls on its chain, those `after` it included."""
        number, feed, draw, _, inner = state
        rest = self.rests[number]
        works.extend((steps, rows, after + later) for steps, rows, later in rest.works)
        after += rest.steps
        if inner:
            return max(self.gather(branch, after, works) for branch in inner)
        steps = Work(feed, draw, draw).steps(self.chunk)
        works.append((steps, feed, after))
        return after + steps

    def enough(self, states: States, calls: int) -> bool:
        """Whether `calls` calls are enough for `states`."""
        if not states:
            return True
        if self.failed.get(states, -1) >= calls:
            return False
        if self.bound(states) > calls:
            return False
        self.left -= 1
        if self.left < 0:
            raise _CutOff
        tried: set[States] = set()
        for follow, times in self.follow(states):
            if follow not in tried:
                tried.add(follow)
                if self.enough(follow, calls - times):
                    return True
        self.failed[states] = calls
        return False

    def follow(self, states: States) -> Iterator[tuple[States, int]]:
        """What can come of `states`, and after how many calls; what is furthest from the end first."""
        leaves: list[tuple[int, int, int, int]] = []
        for state in states:
            self.find_leaves(state, 0, leaves)
        order = sorted(range(len(leaves)), key=lambda i: -leaves[i][0])
        held = [i for i in order if leaves[i][3]]
        waiting = [i for i in order if not leaves[i][3]]
        free = self.lanes - len(held)
        feeds = any(feed for _, feed, _, _ in leaves)
        most = min(free, len(waiting))
        # With lanes handed over, doing more is never worse; with lanes kept, a thread may be better begun later.
        fewest = most if self.hand_over else 0 if held else 1
        later_feeds = feeds or any(self.feeds_later(state) for state in states)
        for count in range(most, fewest - 1, -1):
            for begun in combinations(waiting, count):
                chosen = [*held, *begun]
                feeders = [i for i in chosen if leaves[i][1]]
                times = 1
                if not self.hand_over and not later_feeds:
                    # Nothing can begin to better effect until something ends.
                    times = min(leaves[i][2] for i in chosen)
                drawn = dict.fromkeys((i for i in chosen if not leaves[i][1]), times)
                for split in self.splits([leaves[i][1] for i in feeders], self.chunk):
                    if not self.hand_over and any(not n and i in begun for i, n in zip(feeders, split, strict=True)):
                        continue
                    done = drawn | dict(zip(feeders, split, strict=True))
                    counter = iter(range(len(leaves)))
                    yield self.advance(states, done, counter), times

    def find_leaves(self, state: State, after: int, leaves: list[tuple[int, int, int, int]]) -> None:
        number, feed, draw, held, inner = state
        after += self.rests[number].steps
        if inner:
            for branch in inner:
                self.find_leaves(branch, after, leaves)
        else:
            leaves.append((after + Work(feed, draw, draw).steps(self.chunk), feed, draw, held))

    def feeds_later(self, state: State) -> bool:
        return self.rests[state[0]].feeds or any(self.feeds_later(branch) for branch in state[4])

    def splits(self, wanted: Sequence[int], room: int) -> Iterator[tuple[int, ...]]:
        """All ways to share out `room` rows, none left over that is wanted; the first wants are served first."""
        if not wanted:
            yield ()
            return
        least = max(0, min(room, sum(wanted)) - sum(wanted[1:]))
        for rows in range(min(room, wanted[0]), least - 1, -1):
            for others in self.splits(wanted[1:], room - rows):
                yield (rows, *others)

    def advance(self, states: States, done: dict[int, int], counter: Iterator[int]) -> States:
        """`states` when the leaf of each number in `done` has been fed that many rows, or has drawn that often."""
        found: list[State] = []
        for number, feed, draw, held, inner in states:
            if inner:
                branches = self.advance(inner, done, counter)
                if branches:
                    found.append((number, 0, 0, 0, branches))
                else:
                    found.extend(self.enter(self.rests[number].items, 0))
                continue
            amount = done.get(next(counter))
            if amount is None:
                found.append((number, feed, draw, held, inner))
                continue
            if feed:
                feed -= amount
                if not feed and draw:
                    draw -= 1
            else:
                draw -= amount
            holds = 0 if self.hand_over else 1
            if feed or draw:
                found.append((number, feed, draw, holds, inner))
            else:
                found.extend(self.enter(self.rests[number].items, holds))
        return tuple(sorted(found))
