"""The scheduler alone: lanes, limits, pages, priorities, and that it always gets to the end."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.compiler.scheduler import Child, Machine, Need, Policy, Scheduler, Thread, Waiting


def _drain(scheduler: Scheduler, work: dict[int, int], machine: Machine) -> list[list[int]]:
    """Run leaf threads that each draw work[index] tokens; returns the indices in each step."""
    steps: list[list[int]] = []
    while True:
        for thread in scheduler.start():
            if thread.parent is not None:
                scheduler.submit(thread, draw=work[thread.index])
        step = scheduler.next()
        if step is None:
            return steps
        assert len(step.draws) <= machine.lanes
        steps.append([t.index for t in step.draws])
        for thread in scheduler.advance(step):
            scheduler.end(thread)


def _forked(machine: Machine, needs: list[Need], peak: int, limit: int | None = None) -> tuple[Scheduler, Thread]:
    scheduler = Scheduler(machine)
    root = scheduler.open(Child(Need(peak)))
    assert scheduler.start() == [root]
    scheduler.fork(root, [Child(need) for need in needs], base=0, limit=limit)
    return scheduler, root


def test_lanes_are_kept_and_handed_over() -> None:
    """Five branches on two lanes: never more than two at once, and a lane is taken up in the next step."""
    machine = Machine(lanes=2, pages=100)
    scheduler, _ = _forked(machine, [Need(1)] * 5, 10)
    assert _drain(scheduler, dict(enumerate([1, 2, 1, 1, 1])), machine) == [[0, 1], [1, 2], [3, 4]]


def test_limit_holds_below_the_lanes() -> None:
    """`limit=1` runs branches one after another."""
    machine = Machine(lanes=8, pages=100)
    scheduler, _ = _forked(machine, [Need(1)] * 3, 10, limit=1)
    assert _drain(scheduler, {0: 1, 1: 1, 2: 1}, machine) == [[0], [1], [2]]


def test_a_tight_pool_runs_branches_one_after_another() -> None:
    """With just the depth-first peak, one branch is carried by the parent's reservation and the others wait."""
    machine = Machine(lanes=8, pages=5)
    scheduler, _ = _forked(machine, [Need(5, 0)] * 3, 5)
    assert _drain(scheduler, {0: 1, 1: 1, 2: 1}, machine) == [[0], [1], [2]]


def test_the_tight_order_is_descending_peak_less_kept() -> None:
    """Liu's order: what gives most back goes first."""
    machine = Machine(lanes=8, pages=12)
    scheduler, root = _forked(machine, [Need(6, 4), Need(12, 1), Need(3, 3)], 12)
    order = [step[0] for step in _drain(scheduler, {0: 1, 1: 1, 2: 1}, machine)]
    assert order == [1, 0, 2]
    assert root.state == "waiting"


def test_the_longest_path_starts_first() -> None:
    """Where pages allow any order, the branch with most to do goes first."""
    machine = Machine(lanes=1, pages=100)
    scheduler = Scheduler(machine)
    root = scheduler.open(Child(Need(10)))
    scheduler.start()
    scheduler.fork(root, [Child(Need(1), 5), Child(Need(1), 9), Child(Need(1), 7)], base=0)
    assert [s[0] for s in _drain(scheduler, {0: 1, 1: 1, 2: 1}, machine)] == [1, 2, 0]


def test_prefill_is_cut_to_the_chunk_and_runs_beside_decode() -> None:
    """A prompt of ten rows under a chunk of four takes three steps; the other thread draws meanwhile."""
    machine = Machine(lanes=2, pages=100, chunk=4)
    scheduler, _ = _forked(machine, [Need(1)] * 2, 10)
    first, second = scheduler.start()
    scheduler.submit(first, feed=10, draw=1)
    scheduler.submit(second, draw=3)
    seen = []
    while (step := scheduler.next()) is not None:
        seen.append(([n for _, n in step.feeds], len(step.draws)))
        for thread in scheduler.advance(step):
            scheduler.end(thread)
    assert seen == [([4], 1), ([4], 1), ([2], 1)]


def test_a_branch_gives_back_what_was_reserved_for_it() -> None:
    """Where all that the branches keep fits, each that is not carried takes and gives back the rest of its peak."""
    scheduler, _ = _forked(Machine(lanes=8, pages=20), [Need(3, 1)] * 3, 5)
    threads = scheduler.start()
    taken = scheduler.reserved
    assert [thread.carried for thread in threads] == [True, False, False]
    for thread in threads[1:]:
        before = scheduler.reserved
        scheduler.end(thread, kept=1)
        assert before - scheduler.reserved == 2
    assert taken - scheduler.reserved == 4


def test_what_has_run_goes_first_and_then_the_longest_path() -> None:
    """The default policy ranks by: has run before, arrival of the plan, longest path, order, index."""
    least = Waiting(plan=0, path_tokens=9, order=0, index=0, siblings=1, resumed=True)
    rank = Policy().rank
    ranks = [
        rank(least),
        rank(replace(least, index=1)),
        rank(replace(least, order=1)),
        rank(replace(least, path_tokens=8)),
        rank(replace(least, plan=1, path_tokens=99)),
        rank(replace(least, resumed=False)),
    ]
    assert ranks == sorted(set(ranks))


def test_a_policy_sees_what_waits() -> None:
    """It is told of each branch in turn with those that wait beside it, and of a parent that goes on, alone."""
    seen: list[Waiting] = []

    class Watching(Policy):
        def rank(self, waiting: Waiting) -> tuple[int, ...]:
            seen.append(waiting)
            return super().rank(waiting)

    scheduler = Scheduler(Machine(lanes=4, pages=20), Watching())
    root = scheduler.open(Child(Need(9), 7))
    scheduler.start()
    fork = scheduler.fork(root, [Child(Need(1), 5)] * 2, base=1)
    for thread in scheduler.start():
        scheduler.end(thread)
    scheduler.close(fork)
    scheduler.resume(root)
    assert seen == [
        Waiting(plan=0, path_tokens=5, order=0, index=0, siblings=2, resumed=False),
        Waiting(plan=0, path_tokens=5, order=0, index=1, siblings=1, resumed=False),
        Waiting(plan=0, path_tokens=7, order=1, index=0, siblings=1, resumed=True),
    ]


def test_it_tells_whether_anything_waits() -> None:
    """For a lane, for pages, or parked until its need is reserved; a guest that runs does not wait."""
    scheduler = Scheduler(Machine(lanes=1, pages=9))
    root = scheduler.open(Child(Need(9)))
    assert scheduler.has_waiting
    scheduler.start()
    assert not scheduler.has_waiting
    scheduler.fork(root, [Child(Need(1))] * 2, base=1)
    (first,) = scheduler.start()
    assert scheduler.has_waiting
    scheduler.end(first)
    scheduler.start()
    assert not scheduler.has_waiting
    crowded = Scheduler(Machine(lanes=4, pages=10), room=lambda: 10)
    crowded.open(Child(Need(8)))
    guest = crowded.open(Child(Need(9)))
    crowded.start()
    assert guest.guest
    assert not crowded.has_waiting
    assert not crowded.promote(guest)
    assert crowded.has_waiting


def test_misuse_is_refused() -> None:
    """Work for a thread that has some, a second end, a plan that can never fit."""
    scheduler = Scheduler(Machine(pages=4))
    with pytest.raises(ValueError, match="needs 5 pages"):
        scheduler.open(Child(Need(5)))
    root = scheduler.open(Child(Need(4)))
    scheduler.start()
    scheduler.submit(root, draw=1)
    with pytest.raises(ValueError, match="cannot be given"):
        scheduler.submit(root, draw=1)
    step = scheduler.next()
    assert step is not None
    for times in (0, 2):
        with pytest.raises(ValueError, match="cannot run"):
            scheduler.advance(step, times)
    scheduler.end(root)
    with pytest.raises(ValueError, match="ended twice"):
        scheduler.end(root)


Tree = list["Tree"]  # type: ignore[misc]
TREES = st.recursive(st.just([]), lambda t: st.lists(t, min_size=1, max_size=4), max_leaves=14)


@settings(max_examples=300, deadline=None)
@given(TREES, st.integers(1, 4), st.integers(0, 6), st.lists(st.booleans(), min_size=40, max_size=40))
def test_the_depth_first_peak_always_suffices(tree: Tree, lanes: int, spare: int, keeps: list[bool]) -> None:
    """Nested forks finish in any pool of at least the depth-first peak, and never use more than the pool."""
    flags = iter(keeps * 20)

    def distinct(node: Tree) -> Tree:
        return [distinct(child) for child in node]

    tree = distinct(tree)
    needs: dict[int, Need] = {}
    order: list[list[int]] = []

    def need(node: Tree) -> Need:
        children = sorted((need(child) for child in node), key=lambda n: n.kept - n.peak)
        held, peak = 1, 1
        for child in children:
            peak = max(peak, held + child.peak)
            held += child.kept
        if node:
            held += 1
            peak = max(peak, held)
        found = Need(peak, held if next(flags) else 0)
        needs[id(node)] = found
        return found

    root_need = need(tree)
    machine = Machine(lanes=lanes, pages=root_need.peak + spare)
    scheduler = Scheduler(machine)
    root = scheduler.open(Child(root_need))
    nodes = {root: tree}
    held: dict[Thread, int] = {}
    kept: dict[Thread, int] = {}
    resumed: set[Thread] = set()
    ended = 0
    while True:
        for thread in scheduler.start():
            if thread.group is not None and thread not in nodes:
                nodes[thread] = nodes[thread.parent][thread.index]  # type: ignore[index]
            held[thread] = held.get(thread, 0) + 1
            scheduler.submit(thread, draw=1)
        assert sum(held.values()) + sum(kept.values()) <= machine.pages
        step = scheduler.next()
        if step is None:
            break
        order.append([t.index for t in step.draws])
        for thread in scheduler.advance(step):
            node = nodes[thread]
            if node and thread not in resumed:
                children = [Child(needs[id(child)]) for child in node]
                scheduler.fork(thread, children, base=held[thread])
                continue
            ended += 1
            stays = needs[id(node)].kept
            held.pop(thread)
            if stays:
                kept[thread] = stays
            scheduler.end(thread, kept=stays)
            fork, parent = thread.group, thread.parent
            if fork is not None and parent is not None and not fork.active and not fork.pending:
                scheduler.close(fork)
                for child in [t for t in kept if t.group is fork]:
                    held[parent] += kept.pop(child)
                resumed.add(parent)
                scheduler.resume(parent)
    assert ended == sum(1 for _ in needs)
    assert scheduler.reserved == 0 and scheduler.idle
