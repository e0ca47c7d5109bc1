"""The scheduler against the best schedule, and against the bounds that docs/scheduler.md states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.compiler.scheduler import Machine, Policy, Waiting
from anabranch.runtime.events import GenEnded
from anabranch.testing import Outcome, Plan, Trace, simulate

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from forktrees import Branch, Fork, Wasted, Work, figures, measure
from optimum import Search, States, optimum
from quality import Author, batch, batches, compare, large, large_plans, small_plans

PAGES = 1 << 30


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("prefill", [True, False])
def test_small_plans_are_near_the_optimum(foreseen: bool, prefill: bool) -> None:
    """The median of calls over the optimum under the scheduler's own lane rule is within 5%."""
    found = [compare(*drawn, most_states=2000) for drawn in small_plans(80, foreseen=foreseen, prefill=prefill)]
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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plans(), st.integers(1, 5), st.integers(1, 12))
def test_no_call_wastes_a_lane_or_a_row(batched: list[Branch], lanes: int, chunk: int) -> None:
    """No lane is free while a thread waits, no row of the chunk is left that a thread could use, and calls are bounded.

    `measure` checks the first two at each call.
    """
    machine = Machine(lanes, PAGES, chunk=chunk)
    assert measure(batched, machine).calls <= figures(batched, chunk).steps_bound(machine)


def whole(items: Sequence[Work | Fork]) -> list[Branch]:
    """One plan that does these."""
    return [Branch(tuple(items))]


class OneLaneFree(Policy):
    """Leaves one lane free."""

    def holds_back(self, waiting: Waiting, free_lanes: int) -> bool:
        return free_lanes == 1


def test_a_wasted_lane_is_noticed() -> None:
    """`measure` refuses a run in which a thread waits beside a free lane."""
    with pytest.raises(Wasted, match="1 threads wait, 2 lanes are held"):
        measure(whole([Fork((Branch((Work(0, 2, 2),)),) * 3)]), Machine(3, PAGES), OneLaneFree())


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


def test_known_optima() -> None:
    """Three of two tokens on two lanes: three calls where lanes are handed over (McNaughton 1959), else four."""
    machine = Machine(2, PAGES)
    three = whole([Fork((Branch((Work(0, 2, 2),)),) * 3)])
    assert optimum(three, machine, hand_over=True, upper=9, most_states=100) == 3
    assert optimum(three, machine, hand_over=False, upper=9, most_states=100) == 4
    assert measure(three, machine).calls == 4


def written(branch: Branch, place: str = "") -> str:
    """A plan's text for a tree: a prompt of `feed` letters and a gen for each work, names unique by place."""
    parts = []
    for number, item in enumerate(branch.items):
        here = f"{place}_{number}"
        match item:
            case Work():
                parts.append(f'w{here} = gen("{"q" * item.feed}", max={item.most});')
            case Fork():
                inner = [
                    f"b{here}_{i} = branch() {{ {written(b, f'{here}_{i}')} }};" for i, b in enumerate(item.branches)
                ]
                limit = "" if item.limit is None else f"limit={item.limit}"
                parts.append(f"f{here} = fork({limit}) {{ {' '.join(inner)} }} join(all, drop);")
    return " ".join(parts)


def lived(branch: Branch, ends: Mapping[str, GenEnded], place: str = "") -> Branch:
    """The tree as a run of `written` made it. A fork feeds the last token before it, which ends its segment."""
    items: list[Work | Fork] = []
    unfed = False
    for number, item in enumerate(branch.items):
        here = f"{place}_{number}"
        match item:
            case Work():
                end = ends[f"w{here}"]
                start = not place and not number
                items.append(Work(item.feed + start, end.drawn, item.most))
                unfed = end.end == "max"
            case Fork():
                if unfed:
                    items.append(Work(1, 0, 0))
                    unfed = False
                inner = tuple(lived(b, ends, f"{here}_{i}") for i, b in enumerate(item.branches))
                items.append(Fork(inner, item.limit))
    return Branch(tuple(items))


def limited(branch: Branch, rng: random.Random) -> Branch:
    """The same tree with a limit on some forks, and a prompt for every gen."""
    items: list[Work | Fork] = []
    for item in branch.items:
        match item:
            case Work():
                items.append(Work(item.feed + 1, item.draw, item.most))
            case Fork():
                items.append(Fork(tuple(limited(b, rng) for b in item.branches), rng.choice((None, None, 1, 2))))
    return Branch(tuple(items))


def test_the_engine_takes_as_many_calls() -> None:
    """The engine itself, its model a script that ends gens early, takes the calls that `measure` counts."""
    rng = random.Random(11)
    compared = stopped = 0
    for _ in range(60):
        trees = []
        for _ in range(rng.randint(1, 3)):
            author = Author(rng, False, "uniform", rng.choice((4, 12)), 5)
            trees.append(limited(author.tree(rng.randint(2, 12), 8), rng))
        outcomes = [Outcome(rng.randint(1, 12), "end_of_turn", rng.randint(0, 9)) for _ in range(6)]
        machine = Machine(rng.randint(1, 5), 20_000, chunk=rng.randint(3, 16))
        batched = [Plan.parse(f"p = plan() {{ {written(tree)} }}") for tree in trees]
        found = simulate(batched, machine, Trace(tuple(outcomes)), prefix_cache=False)
        assert all(result.status == "ok" for result in found.results)
        if any(result.counts["tokens_trimmed"] for result in found.results):
            continue  # half a character at a gen's end: what is fed then is not told by its lengths
        lives = []
        for tree, result in zip(trees, found.results, strict=True):
            ends = {event.site: event for event in result.events if isinstance(event, GenEnded)}
            stopped += sum(end.end == "end_of_turn" for end in ends.values())
            lives.append(lived(tree, ends))
        assert measure(lives, machine).calls == found.num_steps
        assert found.num_steps <= min(result.counts["steps_bound"] for result in found.results)
        compared += 1
    assert compared >= 30
    assert stopped >= 100
