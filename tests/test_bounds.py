"""Bounds, against plans worked out by hand, brute force, and the schedules that the scheduler makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from anabranch.compiler.amounts import CAP, Amount, after_rounds, most, symbol
from anabranch.compiler.bounds import Bounds, reduce_groups
from anabranch.compiler.graph import Call, Fork, Loop, Map, Reduce, walk
from anabranch.compiler.pipeline import Compiled, compile_plan
from anabranch.compiler.profile import Profile, at_once_peak, depth_first_peak, kept_at_join
from anabranch.compiler.record import record
from anabranch.compiler.schedule import Choose, Decode, Flush, Prefill, Repeat, Step, size
from anabranch.compiler.scheduler import Machine, Need
from anabranch.compiler.sizes import ByteSizes
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


def compiled_of(text: str) -> Compiled:
    return compile_plan(parse_text(text))


def bounds_of(text: str, inputs: Mapping[str, Any] | None = None, **machine: int) -> Bounds:
    return compiled_of(text).bounds_on(Machine(**machine), None, inputs)


def test_vote_by_hand() -> None:
    """Every figure of a vote: a token a byte, a start token, and a newline after the user's turn."""
    bounds = bounds_of(VOTE)
    cost = bounds.cost
    prefix, branch = 1 + 20 + 1, 40 + 7 + 12
    assert (bounds.total_tokens, bounds.critical_path_tokens) == (4 * 52 + 8, 52 + 8)
    assert (cost.prefilled, cost.reprefilled, cost.flushed) == (prefix + 4 * 7 + 8, 0, 1)
    assert cost.aliased == 4 * prefix + branch
    assert bounds.largest_position == prefix + branch + 8 + 8
    # A branch's pages stay until the vote is read, so the last stands on those of the other three.
    assert bounds.pages_depth_first == 2 + 3 * 4 + 4 == bounds.pages_full_width
    assert (cost.width, cost.depth, cost.threads) == (4, 1, 4)
    # 1 to prefill, 40 + 12 for a branch, whose second prompt comes with a token, 1 to flush, 8 for the last gen.
    assert cost.steps == 1 + 52 + 1 + 8
    # Six feeds that no draw follows: at the fork, at the end of each branch, at the join.
    assert bounds.steps_bound(bounds.machine) == (216 + 6 + 1) // 64 + (58 + 6 + 1) // 512 + 62


def test_drop_keeps_nothing() -> None:
    """Branches of a dropping join run one after another in the pages of one."""
    bounds = bounds_of(VOTE.replace("stitch", "drop"))
    assert bounds.pages_depth_first == 2 + 4
    assert bounds.pages_full_width == 2 + 4 * 4
    assert bounds.cost.aliased == 4 * 22
    assert bounds.cost.flushed == 0


def test_lanes_bound_the_width_of_plain_branches() -> None:
    """Branches without forks of their own hold a lane while they hold pages."""
    assert bounds_of(VOTE.replace("stitch", "drop"), lanes=3).pages_full_width == 2 + 3 * 4


def test_stitch_of_several() -> None:
    """Under `max` the parent goes on at the largest end, under `sum` at the end of all; it sees all either way."""
    text = """
p = plan() {
  x = fork() {
    branch("ab") { y = gen(max=10); return(y); };
    branch("c") { y = gen(max=20); return(y); };
  } join(all, WHERE);
  z = gen("d", max=5);
}
"""
    at_max = bounds_of(text.replace("WHERE", "stitch"))
    at_sum = bounds_of(text.replace("WHERE", "stitch(sum)"))
    assert at_max.largest_position == 1 + 21 + 1 + 5
    assert at_sum.largest_position == 1 + 12 + 21 + 1 + 5
    assert at_max.cost.view == at_sum.cost.view == 1 + 12 + 21 + 1 + 5
    assert at_max.cost.aliased == 2 * 1 + 12 + 21
    assert at_max.cost.flushed == 2


def test_a_text_join_feeds_again() -> None:
    """What a `text` join appends is prefilled, and counted as generated before; 8 more for each branch's joint."""
    cost = bounds_of('p = plan() { x = fork(3) { y = gen("ab", max=10); return(y); } join(all, text); }').cost
    assert cost.reprefilled == 3 * (12 + 8)
    assert cost.prefilled == 1 + 3 * 2 + cost.reprefilled


def test_fresh_branches_stand_alone() -> None:
    """A fresh branch aliases nothing, starts with a start token, and its positions are its own."""
    bounds = bounds_of("""
p = plan() { text("0123456789"); x = fork(2, fresh=true) { y = gen("a", max=30); return(y); }; z = gen("b", max=3); }
""")
    assert bounds.cost.aliased == 0
    assert bounds.largest_position == 1 + 1 + 30
    assert bounds.cost.prefilled == 11 + 2 * 2 + 1


def test_limit_puts_branches_in_a_row() -> None:
    """With two at once, five branches take three rounds; unequal ones (work - longest) / 2 + longest."""
    assert (
        bounds_of('p = plan() { x = fork(5, limit=2) { y = gen("a", max=10); return(y); }; }').critical_path_tokens
        == 30
    )
    arms = " ".join(f'branch("a") {{ y = gen(max={n}); return(y); }};' for n in (4, 6, 30, 8))
    bounds = bounds_of(f"p = plan() {{ x = fork(limit=2) {{ {arms} }}; }}")
    assert bounds.critical_path_tokens == (48 - 30) // 2 + 30
    assert bounds.cost.width == 2


def test_reduce_by_levels() -> None:
    """Seven items by three are two groups and one that passes, then one group: two levels deep."""
    assert reduce_groups(7, 3) == [2, 1]
    assert reduce_groups(1, 2) == [] == reduce_groups(0, 2)
    bounds = bounds_of("""
p = plan(xs: list(7, text(4))) { z = reduce(g: xs, by=3) { r = gen("#{g}", max=10); return(r); }; return(z); }
""")
    assert bounds.total_tokens == 3 * 10
    assert bounds.critical_path_tokens == 2 * 10
    # A group is three values of at most 10 + 8 tokens (what a merge yields) and the newlines between.
    assert bounds.cost.prefilled == 1 + 3 * (3 * 18 + 2)


@given(st.integers(0, 400), st.integers(2, 9))
def test_reduce_is_monotone(count: int, by: int) -> None:
    """Fewer items never take more groups or levels, so the most items are the worst case."""
    fewer, more = reduce_groups(count, by), reduce_groups(count + 1, by)
    assert sum(fewer) <= sum(more) and len(fewer) <= len(more)


def test_budgets_divide_equally_where_the_worst_case_does_not_fit() -> None:
    """What follows is kept back, and the branches share the rest: (100 - 20) / 4 each."""
    text = """
p = plan(BUDGET) { x = fork(4) { y = gen("a", max=60); return(y); } join(vote(y), stitch); z = gen("b", max=20); }
"""
    bounds = bounds_of(text.replace("BUDGET", "budget=100"))
    assert bounds.total_tokens == 100
    assert bounds.critical_path_tokens == 20 + 20
    assert bounds.largest_position == 1 + 1 + 20 + 1 + 20
    assert bounds_of(text.replace("BUDGET", "budget=260")).cost == bounds_of(text.replace("BUDGET", "")).cost


def test_retries_count() -> None:
    """A branch that may be run twice more costs three times as much, and no more pages."""
    text = 'p = plan() {{ x = fork() {{ branch({}) {{ y = gen(max=10); }}; branch("b") {{ y = gen(max=4); }}; }}; }}'
    once, thrice = bounds_of(text.format('"a"')), bounds_of(text.format('"a", retry=2'))
    assert (once.total_tokens, thrice.total_tokens) == (14, 34)
    assert thrice.critical_path_tokens == 30
    assert once.pages_depth_first == thrice.pages_depth_first


def test_recursion_by_depth() -> None:
    """A plan that calls itself twice, three deep, decodes 5 (1 + 2 + 4 + 8) tokens, and its needs shrink as it goes."""
    compiled = compiled_of("""
p = plan(q: text(3), depth=3) { x = gen("a", max=5); if (x == "y") { a = p(q); b = p(q); }; return(x); }
""")
    bounds = compiled.bounds_on(Machine())
    assert bounds.total_tokens == 5 * 15
    assert bounds.cost.depth == 3
    calls = [node for region, place in walk(compiled.graph.plans["p"].region)
             if isinstance(node := region.nodes[place], Call)]  # fmt: skip
    peaks = [bounds.children(calls[0], 1, depth)[0].need.peak for depth in range(3)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[2]
    with pytest.raises(ValueError, match="deeper than 3"):
        bounds.children(calls[0], 1, 3)


def test_hostile_loops_and_forks_stay_cheap() -> None:
    """Rounds, widths and nests are multiplied out, not walked: eight million branches cost what three do."""
    inner = 'g = gen("a", max=250);'
    for depth in range(3):
        inner = f"loop(20) {{ x{depth} = fork(10) {{ {inner} }} join(all, stitch); }};"
    bounds = bounds_of(f"p = plan() {{ {inner} }}")
    assert bounds.total_tokens == 250 * (20 * 10) ** 3
    assert bounds.cost.width == 10**3
    assert bounds.cost.threads == 200 + 200**2 + 200**3


BODIES = (
    'g{n} = gen("ab", max=7);',
    'text("abc"); f{n} = fork(2) {{ h = gen("ab", max=9); return(h); }} join(all, stitch);',
    'g{n} = gen("ab", max=7); f{n} = fork(3) {{ h = gen("ab", max=9); }} join(vote(h), stitch); text("abcde");',
    'f{n} = fork(3) {{ h = gen("ab", max=9); return(h); }} join(all, drop); u{n} = gen("a", max=3);',
    'g{n} = gen("ab", max=7); f{n} = fork(2) {{ h = gen("ab", max=9); return(h); }} join(all, text);',
)


@pytest.mark.parametrize("body", BODIES)
def test_a_loop_is_its_body_again_and_again(body: str) -> None:
    """The closed form of a loop equals the body written out four times."""
    loop = bounds_of(f'p = plan() {{ text("x"); loop(4) {{ {body.format(n=0)} }}; z = gen("q", max=2); }}', page_size=4)
    rows = " ".join(body.format(n=n) for n in range(4))
    written = bounds_of(f'p = plan() {{ text("x"); {rows} z = gen("q", max=2); }}', page_size=4)
    # A loop feeds what waits before each round, which the body written out may feed with what follows.
    assert loop.cost.steps >= written.cost.steps
    assert replace(loop.cost, steps=0, overhead_steps=0) == replace(written.cost, steps=0, overhead_steps=0)


# --- pages, depth first

Tree: TypeAlias = "tuple[int, bool, tuple[Tree, ...]]"
"""Tokens of a thread, whether its join stitches all, and its branches."""


def trees() -> st.SearchStrategy[Tree]:
    leaves = st.tuples(st.integers(1, 9), st.booleans(), st.just(()))
    return st.recursive(
        leaves, lambda inner: st.tuples(st.integers(1, 9), st.booleans(), st.lists(inner, max_size=3).map(tuple)),
        max_leaves=5,
    )  # fmt: skip


def _plan_of(tree: Tree, name: str = "r") -> str:
    tokens, stitches, branches = tree
    text = f'g{name} = gen("a", max={tokens});'
    if branches:
        arms = " ".join(f'branch("b") {{ {_plan_of(b, f"{name}{i}")} }};' for i, b in enumerate(branches))
        text += f" f{name} = fork() {{ {arms} }} join(all, {'stitch' if stitches else 'drop'});"
    return text


def _every_order(tree: Tree, known: int) -> Iterator[tuple[int, int]]:
    """(peak, kept) in pages of 4 tokens for every depth-first order; `known` tokens come before a thread's gen."""
    tokens, stitches, branches = tree
    own = -(-(tokens + 1 + known) // 4)
    if not branches:
        yield own, own
        return
    inner = [list(_every_order(branch, 1)) for branch in branches]
    for choice in product(*inner):
        for order in permutations(choice):
            held = peak = own
            for branch_peak, branch_kept in order:
                peak = max(peak, held + branch_peak)
                held += branch_kept if stitches else 0
            yield peak, held


@given(trees())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_depth_first_peak_is_the_least_of_all_orders(tree: Tree) -> None:
    """Descending (peak - kept) is as good as the best of all depth-first orders, tried one by one."""
    bounds = bounds_of(f"p = plan() {{ {_plan_of(tree)} }}", page_size=4)
    assert bounds.pages_depth_first == min(peak for peak, _ in _every_order(tree, 1))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_liu_order_on_any_children(pairs: Sequence[tuple[int, int]]) -> None:
    """The same for bare (peak, kept), multiplicities written out or counted."""
    needs = [Need(max(peak, kept), kept) for peak, kept in pairs]
    best = 0
    if needs:
        best = min(_peak_in(order) for order in permutations(needs))
    assert depth_first_peak([(need, 1) for need in needs]) == best
    assert depth_first_peak([(need, 3) for need in needs]) == depth_first_peak([(need, 1) for need in needs * 3])


def _peak_in(order: Sequence[Need]) -> int:
    held = peak = 0
    for need in order:
        peak = max(peak, held + need.peak)
        held += need.kept
    return peak


def test_all_at_once_and_what_stays() -> None:
    """At once, those that run stand at their peak and the rest keep; a join keeps the largest of its winners."""
    children = [(Need(10, 2), 2), (Need(5, 4), 1)]
    assert at_once_peak(children, None) == 25
    assert at_once_peak(children, 1) == 10 + 2 + 4
    assert kept_at_join(children, None) == 8
    assert kept_at_join(children, 1) == 4


def test_either_holds_both_arms() -> None:
    """An arm with a control point and one without: what follows either takes no more than what follows their bound."""
    straight, sealed, after = Profile(30), Profile(3, True, 5, 5, 2, 1), Profile(7)
    both = straight.either(sealed).then(after, 4)
    for arm in (straight, sealed):
        assert arm.then(after, 4).total(4) <= both.total(4)
        assert arm.then(after, 4).highest(4) <= both.highest(4)


# --- against the schedule


@given(plans())
@settings(max_examples=150, deadline=None, derandomize=True, phases=NO_SHRINK, suppress_health_check=list(HealthCheck))
def test_bounds_hold_of_the_recorded_worst_case(plan: Plan) -> None:
    """What the clock records, loops multiplied out and the larger arm taken, is within the bounds; without conditions,
    budgets and retries it is them."""
    compiled = plan.compiled
    bounds = compiled.bounds_on(Machine(lanes=64, pages=10**6), None, plan.inputs)
    steps = record(bounds).steps
    drawn, fed, flushed = _counts(steps)
    assume(not bounds.budget_binds)
    assert drawn <= bounds.cost.decoded and fed <= bounds.cost.prefilled
    # A loop's first round, which is recorded for all, may flush what only the statement before the loop left unfed.
    assert flushed <= bounds.cost.flushed or "Loop(" in str(compiled.graph)
    if not any(word in str(compiled.graph) for word in ("Cond(", "retry=1", "retry=2", "retry=3")):
        assert (drawn, fed) == (bounds.cost.decoded, bounds.cost.prefilled)


def _counts(steps: Sequence[Step]) -> tuple[int, int, int]:
    """Tokens drawn, rows prefilled, rows flushed."""
    drawn = fed = flushed = 0
    for step in steps:
        match step:
            case Prefill(parts=parts):
                fed += sum(part.rows * size(part.lanes) for part in parts)
                drawn += sum(part.draws * size(part.lanes) for part in parts)
            case Flush(parts=parts):
                flushed += sum(part.rows * size(part.lanes) for part in parts)
            case Decode(parts=parts, at_most=at_most):
                drawn += at_most * sum(size(part.lanes) for part in parts)
            case Repeat(rounds=rounds, steps=inner):
                more = _counts(inner)
                drawn, fed, flushed = drawn + rounds * more[0], fed + rounds * more[1], flushed + rounds * more[2]
            case Choose(arms=arms):
                each = [_counts(arm) for arm in arms]
                drawn += max(counts[0] for counts in each)
                fed += max(counts[1] for counts in each)
                flushed += max(counts[2] for counts in each)
            case _:
                pass
    return drawn, fed, flushed


# --- sizes


def test_interpolation_counts_what_it_may_hold() -> None:
    """A generated value counts as its max and 8, a parameter as its bound, a given one as it is."""
    text = 'p = plan(q: text(50)) { x = gen("a", max=10); text("#{x}#{x} #{q}"); y = gen(max=2); }'
    assert bounds_of(text).cost.prefilled == 1 + 1 + 18 + 18 + 1 + 50
    assert bounds_of(text).cost.reprefilled == 36
    assert bounds_of(text, {"q": "abc"}).cost.prefilled == 1 + 1 + 18 + 18 + 1 + 3


def test_unbounded_parameters_are_named() -> None:
    """A parameter without a bound counts as nothing until it is given, and is named."""
    bounds = bounds_of('p = plan(q, r: text(5)) { text("#{q}#{r}"); x = gen(max=2); }')
    assert bounds.measured.unbounded == ("q",)
    assert bounds.cost.prefilled == 1 + 5


def test_a_callee_counts_what_it_is_given() -> None:
    """An argument's size goes into the called plan, and what it returns comes back."""
    bounds = bounds_of("""
f = plan(a) { x = gen("#{a}", max=10); return("<#{x}#{a}>"); }
p = plan() { y = f("0123456789"); text("#{y}"); z = gen(max=2); }
""")
    assert bounds.cost.prefilled == 1 + 10 + (2 + 18 + 10)


def test_a_loop_that_grows_a_text() -> None:
    """A carried text that grows by a gen each round is as long as its last round makes it, in every round."""
    bounds = bounds_of("""
p = plan() { log = "ab"; loop(5) { x = gen("c", max=2); log = log + x; text("#{log}"); }; y = gen(max=2); }
""")
    feeds = [bounds.feed(node).rows for region, place in walk(bounds.graph.plans["p"].region)
             if not isinstance(node := region.nodes[place], Loop)]  # fmt: skip
    assert max(feeds) == 2 + 6 * 10
    assert bounds.cost.prefilled >= 1 + 5 * 1 + sum(2 + 10 * n for n in range(1, 6))


def test_a_text_that_doubles_is_capped() -> None:
    """A text that doubles each round grows past every context, and the count stops there."""
    bounds = bounds_of(
        'p = plan() { x = gen("a", max=1); loop(100000) { x = "#{x}#{x}"; }; text("#{x}"); y = gen(max=1); }'
    )
    assert bounds.cost.prefilled >= CAP


def test_rounds_reach_what_they_reach() -> None:
    """Rounds that settle are exact; a steady growth is carried on; symbols of the surroundings stay symbols."""
    x, outer = 1, 9
    settled = after_rounds({x: Amount(3)}, {x: Amount(7)}, 10**9)
    assert settled == {x: Amount(7)}
    steady = after_rounds({x: Amount(3)}, {x: symbol(x) + Amount(2) + symbol(outer)}, 100)
    assert steady == {x: Amount(3 + 200, ((outer, 100),))}
    assert most([Amount(1, ((x, 2),)), Amount(5)]) == Amount(5, ((x, 2),))


def test_choices_by_logprob_feed_their_options() -> None:
    """Options are fed and taken back, and the chosen one is fed: nothing is drawn."""
    cost = bounds_of('p = plan() { x = gen("a", type=choice("yes", "no", by="logprob"), max=4); }').cost
    assert (cost.decoded, cost.prefilled, cost.pos) == (0, 1 + 1 + 5 + 3, 1 + 1 + 3)


def test_recorded_text_is_fed() -> None:
    """A recorded gen draws nothing; its tokens are fed, and count on the critical path."""
    bounds = bounds_of('p = plan() { x = gen("a", max=9, recorded="hello"); }')
    assert (bounds.cost.decoded, bounds.total_tokens, bounds.critical_path_tokens) == (0, 5, 5)
    assert bounds.cost.prefilled == 1 + 1 + 5


# --- what the runtime asks


def test_children_for_admission() -> None:
    """Each branch has the need of its own kind, in branch order, and the path on to the end of the plan."""
    bounds = bounds_of("""
p = plan() {
  x = fork() {
    branch("a") { y = gen(max=30); return(y); };
    branch("b") { y = gen(max=10); return(y); };
  } join(all, stitch);
  z = gen("c", max=7);
}
""")
    fork = bounds.graph.plans["p"].region.nodes[0]
    assert isinstance(fork, Fork)
    assert [child.need for child in bounds.children(fork, 2)] == [Need(2, 2), Need(1, 1)]
    assert [child.path_tokens for child in bounds.children(fork, 2)] == [37, 17]
    assert (bounds.rest(fork), bounds.path(fork)) == (7, 37)
    assert bounds.tokens(fork.arms[0].region) == 30
    assert bounds.root().need == Need(bounds.pages_depth_first)
    with pytest.raises(ValueError, match="has no 3 branches"):
        bounds.children(fork, 3)


def test_rest_leaves_further_rounds_out() -> None:
    """What a budget keeps back for later is what follows in the round and after the loop, not the rounds to come."""
    bounds = bounds_of("""
p = plan() { loop(9) { x = fork(2) { y = gen("a", max=3); return(y); }; z = gen("b", max=4); }; w = gen("c", max=5); }
""")
    (fork,) = (node for region, place in walk(bounds.graph.plans["p"].region)
               if isinstance(node := region.nodes[place], Fork))  # fmt: skip
    assert bounds.rest(fork) == 4 + 5
    assert bounds.path(fork) == 3 + 4 + 8 * (3 + 4) + 5


def test_a_map_has_children_for_any_number_of_items() -> None:
    """Fewer items than the most are as many children; more are refused."""
    bounds = bounds_of('p = plan(xs: list(4)) { y = map(x: xs) { z = gen("a", max=3); return(z); }; return(y); }')
    node = bounds.graph.plans["p"].region.nodes[0]
    assert isinstance(node, Map)
    assert len(bounds.children(node, 2)) == 2 and not bounds.children(node, 0)
    with pytest.raises(ValueError, match="at most 4"):
        bounds.children(node, 5)


def test_parts_of_another_graph_are_refused() -> None:
    """Nodes are known by identity."""
    node = bounds_of(VOTE).graph.plans["solve"].region.nodes[1]
    assert isinstance(node, Fork)
    with pytest.raises(ValueError, match="no part"):
        bounds_of(VOTE).children(node, 1)


@pytest.mark.parametrize(
    ("inputs", "context", "code", "line"),
    [
        ({"problem": "x" * 200}, 150, "prompt-too-long", 'user("#{problem}")'),
        ({"problem": "x"}, 60, "context-too-long", "ans = gen"),
        ({"problem": "x"}, 70, "context-too-long", "why = gen"),
    ],
)
def test_what_passes_the_context_is_shown(inputs: dict[str, str], context: int, code: str, line: str) -> None:
    """A prompt, or a gen, that may pass the model's context does not compile, and is pointed at."""
    compiled = compiled_of(VOTE)
    bounds = compiled.bounds_on(Machine(), ByteSizes(), inputs)
    with pytest.raises(PlanError) as caught:
        compiled.check_bounds(bounds, Machine(), context)
    (found,) = caught.value.diagnostics
    assert found.code == code and found.span is not None
    assert compiled.program.source.text[found.span.start :].startswith(line)


def test_inputs_are_checked_by_name() -> None:
    """A missing input and an unknown one are both told."""
    with pytest.raises(PlanError) as caught:
        compiled_of(VOTE).check_inputs({"question": "x"})
    assert [d.code for d in caught.value.diagnostics] == ["missing-input", "unknown-input"]


def test_reduce_children_are_alike() -> None:
    """Every group of a reduce has the same need, whatever its level."""
    bounds = bounds_of(
        'p = plan(xs: list(9, text(2))) { z = reduce(g: xs) { r = gen("#{g}", max=3); return(r); }; return(z); }'
    )
    node = bounds.graph.plans["p"].region.nodes[0]
    assert isinstance(node, Reduce)
    assert len(set(bounds.children(node, 4))) == 1
