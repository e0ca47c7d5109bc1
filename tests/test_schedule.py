"""The static schedule, its verifier, and the cost model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from anabranch.compiler.bounds import Bounds
from anabranch.compiler.cost import CPU, predict_seconds
from anabranch.compiler.explain import explain
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.record import record
from anabranch.compiler.schedule import (
    Alias,
    Choose,
    Decode,
    Free,
    Part,
    Prefill,
    Repeat,
    Schedule,
    Step,
    Stitch,
    members,
    runs,
    schedule_text,
)
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.show import show
from anabranch.compiler.verify_graph import VerifyError
from anabranch.compiler.verify_schedule import verify_schedule
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text
from anabranch.testing import Plan, plans

NO_SHRINK = [Phase.explicit, Phase.generate]  # a failing plan is small already, and shrinking takes minutes

VOTE = """
solve = plan(problem: text(20)) {
  user("#{problem}");
  answer = fork(4) {
    work = gen(max=40);
    ans = gen("Final: ", type=int, max=12);
    return(ans);
  } join(vote(ans), stitch);
  why = gen("Because ", max=8);
  return([answer, why]);
}
"""

BRANCHING = """
p = plan(q: text(20)) {
  text("#{q}");
  loop(3) {
    y = fork(2) { g = gen("ab", max=30); return(g); } join(all, stitch);
    z = gen("cd", max=4);
  } until(z == "x");
  if (z == "x") { text("e"); } else { w = fork(3) { g = gen("f", max=20); return(g); } join(first(1), stitch); };
  last = gen("h", max=3);
  return(last);
}
"""


def bounds_of(text: str, **machine: int) -> Bounds:
    return compile_plan(parse_text(text)).bounds_on(Machine(**machine))


def scheduled(text: str, **machine: int) -> tuple[Schedule, Bounds]:
    bounds = bounds_of(text, **machine)
    return verify_schedule(record(bounds), bounds), bounds


def test_vote_as_text() -> None:
    """A schedule reads as what happens: branches alias, decode in lockstep, and the winner is stitched."""
    text = show(parse_text(VOTE), "schedule", machine=Machine(lanes=3))
    assert (
        text
        == """\
schedule solve: 114 calls, 5 threads, 18 of 4096 pages of 16, 3 lanes
  prefill  lanes 0 %1 rows=22
  alias    %5: threads 1..3 see thread 0, in lanes 0..2, writing segments 1..3
  decode   x40 lanes 0..2 %3
  prefill  lanes 0..2 %4 rows=7 draws
  decode   x11 lanes 0..2 %4
  alias    %5: threads 4 see thread 0, in lanes 0, writing segments 4
  decode   x40 lanes 0 %3
  prefill  lanes 0 %4 rows=7 draws
  decode   x11 lanes 0 %4
  stitch   %5: thread 0 goes on after threads 1..4, in lane 0, writing segment 5, gains segments 1
  free     segments 2..4
  flush    lanes 0 ... rows=1
  prefill  lanes 0 %6 rows=8 draws
  decode   x7 lanes 0 %6
  free     segments 0..1, 5"""
    )


def test_loops_and_arms_are_recorded_once() -> None:
    """A loop's body stands in the schedule once, whatever its rounds, and a choice has both its arms."""
    schedule, _ = scheduled(BRANCHING)
    longer, _ = scheduled(BRANCHING.replace("loop(3)", "loop(900000)"), pages=10**9)
    assert [type(step) for step in schedule.steps] == [type(step) for step in longer.steps]
    (loop,) = (step for step in schedule.steps if isinstance(step, Repeat))
    (choice,) = (step for step in schedule.steps if isinstance(step, Choose))
    assert loop.rounds == 3 and loop.moved[0].gained
    assert len(choice.arms) == 2 and any(isinstance(step, Alias) for step in choice.arms[1])


@given(plans())
@settings(max_examples=150, deadline=None, derandomize=True, phases=NO_SHRINK, suppress_health_check=list(HealthCheck))
def test_schedules_of_any_plan_verify(plan: Plan) -> None:
    """On a wide machine, and on the smallest pool with few lanes, every plan's schedule passes and keeps its bounds."""
    compiled = plan.compiled
    wide = compiled.bounds_on(Machine(lanes=64, pages=10**6, page_size=4), None, plan.inputs)
    schedule = verify_schedule(record(wide), wide)
    if not _waits(schedule) and not wide.budget_binds:
        assert schedule.calls <= wide.steps_bound(wide.machine)
    if not wide.budget_binds:
        assert schedule.pages_peak <= wide.pages_full_width
    for lanes in (1, 3):
        machine = Machine(lanes=lanes, pages=max(1, wide.pages_depth_first), page_size=4, chunk=8)
        tight = compiled.bounds_on(machine, None, plan.inputs)
        assert tight.pages_depth_first == wide.pages_depth_first
        verify_schedule(record(tight), tight)


@given(plans())
@settings(max_examples=60, deadline=None, derandomize=True, phases=NO_SHRINK, suppress_health_check=list(HealthCheck))
def test_steps_bound_holds_on_few_lanes(plan: Plan) -> None:
    """With pages to spare, a schedule on two lanes and a small chunk is within the bound on steps."""
    machine = Machine(lanes=2, pages=10**6, page_size=4, chunk=6)
    bounds = plan.compiled.bounds_on(machine, None, plan.inputs)
    schedule = record(bounds)
    assume(not _waits(schedule) and not bounds.budget_binds)
    assert schedule.calls <= bounds.steps_bound(machine)


def _waits(schedule: Schedule) -> bool:
    """Whether threads wait while a loop or a choice is recorded, which a run would not let them do."""
    return any(isinstance(step, Repeat | Choose) for step in schedule.steps)


def _change(
    schedule: Schedule, kind: type, change: Callable[[Step], Sequence[Step]], *, last: bool = False
) -> Schedule:
    """`schedule` with the first (or last) step of a kind replaced."""
    places = [place for place, step in enumerate(schedule.steps) if isinstance(step, kind)]
    place = places[-1 if last else 0]
    steps = (*schedule.steps[:place], *change(schedule.steps[place]), *schedule.steps[place + 1 :])
    return replace(schedule, steps=steps)


def _part(step: Step, **changes: object) -> Step:
    assert isinstance(step, Prefill | Decode)
    return replace(step, parts=(replace(step.parts[0], **changes), *step.parts[1:]))  # type: ignore[arg-type]


def _swap(schedule: Schedule, first: int, second: int) -> Schedule:
    steps = list(schedule.steps)
    steps[first], steps[second] = steps[second], steps[first]
    return replace(schedule, steps=tuple(steps))


FAULTS: list[tuple[str, str, Callable[[Schedule], Schedule]]] = [
    ("lanes-in-range", "a lane that is empty", lambda s: _change(s, Prefill, lambda p: [_part(p, lanes=((7, 1),))])),
    (
        "lanes-in-range",
        "a lane twice in a call",
        lambda s: _change(s, Decode, lambda d: [_part(d, lanes=((0, 2), (1, 2)))]),
    ),
    ("chunk-in-range", "more rows than a chunk", lambda s: _change(s, Prefill, lambda p: [_part(p, rows=600)])),
    ("pages-in-range", "a decode past the pool", lambda s: _change(s, Decode, lambda d: [replace(d, at_most=10**6)])),
    ("no-read-after-free", "the prefix freed early", lambda s: _change(s, Stitch, lambda t: [Free(((1, 1),)), t])),
    ("freed-once", "a segment freed twice", lambda s: _change(s, Free, lambda f: [f, f])),
    ("freed-once", "a prefix that branches see", lambda s: _change(s, Alias, lambda a: [a, Free(((0, 1),))])),
    ("sealed-not-written", "a parent that runs beside its branches", lambda s: _change(s, Alias, _beside_parent)),
    ("in-order", "a prompt fed twice", lambda s: _change(s, Prefill, lambda p: [p, p])),
    (
        "joined-when-over",
        "a join without a branch",
        lambda s: _change(s, Stitch, lambda t: [replace(t, branches=((1, 3),))]),
    ),
    ("joined-when-over", "a join read twice", lambda s: _change(s, Stitch, lambda t: [t, t])),
    (
        "stitch-what-branches-wrote",
        "the parent's own",
        lambda s: _change(s, Stitch, lambda t: [replace(t, gained=((0, 1),))]),
    ),
    ("every-node-once", "a decode left out", lambda s: _change(s, Decode, lambda d: [])),
    ("every-node-once", "a decode cut short", lambda s: _change(s, Decode, lambda d: [replace(d, at_most=39)])),
    ("all-rows-fed", "rows left out", lambda s: _change(s, Prefill, lambda p: [_part(p, rows=21)])),
    ("all-freed", "a segment kept", lambda s: _change(s, Free, lambda f: [Free(f.segments[1:])], last=True)),  # type: ignore[union-attr]
    ("peak-as-recorded", "another peak", lambda s: replace(s, pages_peak=s.pages_peak + 1)),
]


def _beside_parent(step: Step) -> list[Step]:
    assert isinstance(step, Alias)
    return [replace(step, lanes=runs(lane + 1 for lane in members(step.lanes))), Decode((_lane(0),), 1)]


def _lane(number: int) -> Part:
    return Part(((number, 1),), (), draws=True)


@pytest.mark.parametrize(("rule", "what", "change"), FAULTS, ids=[what for _, what, _ in FAULTS])
def test_the_verifier_names_the_rule(rule: str, what: str, change: Callable[[Schedule], Schedule]) -> None:
    """Each rule catches a schedule that breaks it, by name, and shows the steps around."""
    schedule, bounds = scheduled(VOTE)
    with pytest.raises(VerifyError) as caught:
        verify_schedule(change(schedule), bounds)
    assert caught.value.rule == rule
    assert "schedule of `solve`" in str(caught.value)


def test_the_verifier_reads_loops_and_arms() -> None:
    """A loop of other rounds, and a choice without one of its arms, are caught."""
    schedule, bounds = scheduled(BRANCHING)
    for change in (
        lambda: _change(schedule, Repeat, lambda r: [replace(r, rounds=4)]),  # type: ignore[arg-type]
        lambda: _change(schedule, Choose, lambda c: [replace(c, arms=c.arms[:1], ends=c.ends[:1])]),  # type: ignore[union-attr]
    ):
        with pytest.raises(VerifyError) as caught:
            verify_schedule(change(), bounds)
        assert caught.value.rule == "rounds-of-the-loop"


def test_a_small_pool_is_refused_with_both_figures() -> None:
    """A pool below the depth-first peak does not compile, and the error says how much is needed and had."""
    with pytest.raises(PlanError) as caught:
        show(parse_text(VOTE), "schedule", machine=Machine(pages=5))
    assert caught.value.code == "pool-too-small"
    assert "18 pages" in str(caught.value) and "has 5" in str(caught.value)


def test_runs_are_consecutive_numbers() -> None:
    """Numbers come back from their runs, in order."""
    numbers = [0, 1, 2, 7, 5, 6, 9]
    assert runs(numbers) == ((0, 3), (7, 1), (5, 2), (9, 1))
    assert list(members(runs(numbers))) == numbers


def test_schedule_size_does_not_grow_with_equal_branches() -> None:
    """Ten times the branches on as many lanes is the same steps; on few lanes, as many more as there are waves."""
    wide = VOTE.replace("fork(4)", "fork(40)")
    assert len(scheduled(wide, lanes=64)[0].steps) == len(scheduled(VOTE)[0].steps)
    waves = [len(scheduled(VOTE.replace("fork(4)", f"fork({n})"), lanes=4)[0].steps) for n in (40, 80, 120)]
    assert waves[2] - waves[1] == waves[1] - waves[0]


def test_predicted_time_follows_the_calls() -> None:
    """Twice the tokens take about twice as long, and a wider call little longer: the weights are read once."""
    one, _ = scheduled('p = plan() { x = gen("a", max=1000); return(x); }')
    two, _ = scheduled('p = plan() { x = gen("a", max=2000); return(x); }')
    many, _ = scheduled('p = plan() { x = fork(8) { y = gen("a", max=1000); return(y); }; return(x); }')
    assert 1.9 < predict_seconds(two) / predict_seconds(one) < 2.2
    assert predict_seconds(many) < 8 * predict_seconds(one) / 3
    assert predict_seconds(two) > 2000 * CPU.call_overhead_s


def test_explain_gives_the_three_figures() -> None:
    """total / critical, 1 - critical / total, sequential / critical; of 4 x 52 + 8 tokens 60 are in a row."""
    found = explain(compile_plan(parse_text(VOTE)), Machine(), baseline_tokens=120)
    assert (found.total_tokens, found.critical_path_tokens) == (216, 60)
    assert found.parallelism_ratio == pytest.approx(3.6)
    assert found.acceleration_ratio == pytest.approx(1 - 60 / 216)
    assert found.token_latency_speedup == pytest.approx(2.0)
    assert "3.60  total / critical" in found.text()
    assert schedule_text(scheduled(VOTE)[0])
