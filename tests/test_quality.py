"""The scheduler against the best schedule, and against the bounds that docs/scheduler.md states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.compiler.scheduler import Machine

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from forktrees import Branch, Fork, Work, figures, measure
from optimum import Search, States, optimum
from quality import Author, batch, batches, compare, large, large_plans, small_plans

PAGES = 1 << 30


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("prefill", [True, False])
def test_small_plans_are_near_the_optimum(foreseen: bool, prefill: bool) -> None:
    """The median of calls over the optimum under the scheduler's own lane rule is within 5%."""
    found = [compare(*drawn, most_states=1000) for drawn in small_plans(50, foreseen=foreseen, prefill=prefill)]
    assert all(one.handed <= one.kept <= one.calls for one in found)
    assert median(one.calls / one.kept for one in found) <= 1.05


@pytest.mark.parametrize("foreseen", [True, False])
def test_large_plans_are_within_the_bound(foreseen: bool) -> None:
    """A fork takes at most max(critical path, work) and its longest branch besides, and so do plans in one batch."""
    found = [stage for drawn in large_plans(60, foreseen=foreseen) for stage in large(*drawn).stages]
    found += [batch(*drawn) for drawn in batches(10, foreseen=foreseen)]
    for stage in found:
        assert stage.of.floor(stage.machine) <= stage.calls
        assert stage.excess <= 1
    bound = [stage for stage in found if stage.work_binds and 1.1 <= stage.load <= 8]
    assert 2 * len(bound) >= len(found)


@st.composite
def plans(draw: st.DrawFn) -> list[Branch]:
    """A few plans with forks in forks, under limits or not, on lengths that were foreseen or not."""
    works = st.builds(
        lambda feed, d, more: Work(feed, d, d + more), st.integers(0, 9), st.integers(1, 6), st.integers(0, 9)
    )
    feeds = st.builds(lambda feed: Work(feed, 0, 0), st.integers(1, 9))

    def branches(inner: st.SearchStrategy[Branch]) -> st.SearchStrategy[Branch]:
        limits = st.none() | st.integers(1, 3)
        forks = st.builds(lambda b, limit: Fork(tuple(b), limit), st.lists(inner, min_size=1, max_size=5), limits)
        return st.lists(works | feeds | forks, max_size=4).map(lambda items: Branch(tuple(items)))

    return draw(st.lists(st.recursive(branches(st.just(Branch(()))), branches, max_leaves=12), min_size=1, max_size=3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plans(), st.integers(1, 5), st.integers(1, 12))
def test_no_call_wastes_a_lane_or_a_row(batched: list[Branch], lanes: int, chunk: int) -> None:
    """No lane is free while a thread waits, no row of the chunk is left that a thread could use, and calls are bounded.

    `measure` checks the first two at each call.
    """
    machine = Machine(lanes, PAGES, chunk=chunk)
    assert measure(batched, machine).calls <= figures(batched, chunk).steps_bound(machine)


def fewest(search: Search, begin: States, most: int) -> int:
    """The fewest calls by going through every state that can be reached, without bounds or memory of failures."""
    states, calls = {begin}, 0
    while () not in states:
        states = {follow for one in states for follow, _ in every(search, one)}
        calls += 1
        assert calls <= most
    return calls


def every(search: Search, states: States) -> Iterator[tuple[States, int]]:
    """All that one call can do, idle lanes and unused rows included."""
    leaves: list[tuple[int, int, int, int]] = []
    for state in states:
        search.find_leaves(state, 0, leaves)

    def go(place: int, lanes: int, rows: int, done: dict[int, int]) -> Iterator[dict[int, int]]:
        if place == len(leaves):
            yield dict(done)
            return
        _, feed, _, held = leaves[place]
        if not held:
            yield from go(place + 1, lanes, rows, done)
        elif feed:
            yield from go(place + 1, lanes - 1, rows, done | {place: 0})
        if lanes and not feed:
            yield from go(place + 1, lanes - 1, rows, done | {place: 1})
        if lanes and feed:
            for count in range(1, min(feed, rows) + 1):
                yield from go(place + 1, lanes - 1, rows - count, done | {place: count})

    held = sum(leaf[3] for leaf in leaves)
    for done in go(0, search.lanes, search.chunk, {}):
        if len(done) <= search.lanes and held <= search.lanes:
            yield search.advance(states, done, iter(range(len(leaves)))), 1


@pytest.mark.parametrize("hand_over", [True, False])
@pytest.mark.parametrize("prefill", [True, False])
def test_the_optimum_is_what_trying_everything_finds(hand_over: bool, prefill: bool) -> None:
    """On tiny plans the search agrees with a walk through all schedules, those that idle on purpose included."""
    rng = random.Random(3)
    for _ in range(25):
        author = Author(rng, True, "uniform", 4, 3 if prefill else 0)
        plan = author.tree(rng.randint(3, 4), 3)
        machine = Machine(2, PAGES, chunk=rng.randint(2, 3) if prefill else 99)
        calls = measure([plan], machine).calls
        search = Search(machine, hand_over, 0)
        found = optimum([plan], machine, hand_over=hand_over, upper=calls, most_states=10**6)
        assert found == fewest(search, search.enter(plan.items, 0), calls)


def whole(items: Sequence[Work | Fork]) -> list[Branch]:
    return [Branch(tuple(items))]


def test_known_optima() -> None:
    """Three of two tokens on two lanes: three calls where lanes are handed over (McNaughton 1959), else four."""
    machine = Machine(2, PAGES)
    three = whole([Fork((Branch((Work(0, 2, 2),)),) * 3)])
    assert optimum(three, machine, hand_over=True, upper=9, most_states=100) == 3
    assert optimum(three, machine, hand_over=False, upper=9, most_states=100) == 4
    assert measure(three, machine).calls == 4
