"""The two laws of a run, on generated plans over the random test model in fp64.

1. Aliasing is invisible: forced to the engine's own tokens, the reference gives the engine's logits. Most of its plans
   are those of `test_aliasing_1.py` and its fellows, which share them.
2. Randomness is local: a branch's tokens depend on (seed, input index, path, index) and what it sees, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from law_runs import COMMON, EXAMPLES, ROOMY, TOLERANCE, engines, hold_against_reference, model, run

from anabranch.dsl.check import check
from anabranch.dsl.parse import parse_text
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import BranchEnded, Event, GenEnded, Path, RunEnded
from anabranch.runtime.reference import ReferenceMismatch
from anabranch.testing import Plan, plans


def test_the_plans_are_valid_and_varied() -> None:
    """Every generated plan passes the checker and reads back as printed; enough of them hold what is hard."""
    held: Counter[str] = Counter()

    @settings(COMMON, max_examples=EXAMPLES // 4)
    @given(plans())
    def look(plan: Plan) -> None:
        check(plan.program, functions=plan.functions, start_token=True)
        assert parse_text(plan.text) == plan.program
        held.update(plans=1, stitch=plan.stitches_several, nested=plan.nests_forks, fail=plan.may_fail)

    look()
    assert held["stitch"] >= 0.30 * held["plans"], held
    assert held["nested"] >= 0.30 * held["plans"], held
    assert held["fail"] >= 0.20 * held["plans"], held


def test_a_fault_breaks_the_first_law() -> None:
    """The comparison is able to fail: one logit moved by a little more than the tolerance is found, and named."""
    plan = Plan.parse('main = plan() { x = fork(2) { y = gen("a", max=3); } join(all, stitch); }')
    (result,) = run(ROOMY, [plan], seed=1)
    hold_against_reference(plan, result)
    rows = list(result.logits)
    moved = rows[2].logits.clone()
    moved[7] += 10 * TOLERANCE
    rows[2] = replace(rows[2], logits=moved)
    with pytest.raises(ReferenceMismatch, match=f"draw {rows[2].index} differ"):
        hold_against_reference(plan, replace(result, logits=tuple(rows)))


# --- the second law


Tokens: TypeAlias = dict[tuple[Path, int], int]


def drawn(result: RunResult) -> Tokens:
    """The token of every draw, by (path, index)."""
    return {(row.path, row.index): row.token for row in result.logits}


def told(result: RunResult) -> dict[Path, list[Event]]:
    """The events of each thread that came to its own end, in order: what no schedule decides.

    What a cancelled branch had come to is decided by time, and so is what happened inside it.
    """
    ended = {event.path: event.status for event in result.events if isinstance(event, BranchEnded)}
    found: dict[Path, list[Event]] = {}
    for event in result.events:
        if isinstance(event, RunEnded):
            continue
        around = [event.path[:n] for n in range(len(event.path) + 1) if event.path[:n] in ended]
        if all(ended[path] not in ("cancelled", "late") for path in around):
            found.setdefault(around[-1], []).append(event)
    return found


def test_batch_mates_and_lanes_do_not_matter() -> None:
    """Law 2: one plan, alone or beside another, on engines of two shapes: the same tokens, values and decisions.

    Log-probabilities are equal bit for bit, or `best(logprob)` among equals would be decided by the batch.
    """

    @settings(COMMON, max_examples=max(1, EXAMPLES // 20))
    @given(
        plans(deadlines=False),
        engines(),
        engines(),
        plans(fuel=30, max_depth=1, deadlines=False),
        st.integers(0, 2**32),
    )
    def law(plan: Plan, one: EngineConfig, two: EngineConfig, other: Plan, seed: int) -> None:
        # Which branches had ended when a join closed is decided by time, unless the engine is deterministic.
        alone = run(replace(one, deterministic=True), [plan], seed=seed)[0]
        beside = run(replace(two, deterministic=True), [plan, other], seed=seed)[0]
        assert (alone.status, alone.value) == (beside.status, beside.value)
        here, there = told(alone), told(beside)
        assert () in here.keys() & there.keys()
        for path in here.keys() & there.keys():
            assert here[path] == there[path]
        tokens = drawn(beside)
        assert all(tokens.get(key, token) == token for key, token in drawn(alone).items())

    law()


WIDE = """
main = plan(n: int) {
  text("Go");
  x = fork(n, upto=6) {
    a = gen(max=4);
    b = fork(2) { c = gen(max=3, temperature=2); } join(all, stitch);
  } join(all, JOIN);
}
"""


@settings(COMMON, max_examples=max(1, EXAMPLES // 100))
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(["drop", "text", "stitch"]), st.integers(0, 2**32))
def test_the_number_of_siblings_does_not_matter(width: int, more: int, context: str, seed: int) -> None:
    """Law 2: a branch draws the same tokens whatever branches stand beside it."""
    program = parse_text(WIDE.replace("JOIN", context))
    narrow, wide = (drawn(run(ROOMY, [Plan(program, {"n": n})], seed=seed)[0]) for n in (width, min(6, width + more)))
    assert narrow
    assert narrow.items() <= wide.items()


APART = """
aid = plan() { v = gen("A", max=6, temperature=5); return(v); }
main = plan() {
  x = fork(3) { g = gen("A", max=6, temperature=5); return(g); };
  y = fork(fresh=true) {
    p = branch() { h = aid(fresh=true); return(h); };
    q = branch() { k = aid(fresh=true); return(k); };
  };
  loop(3) { z = fork(1, fresh=true) { w = gen("A", max=6, temperature=5); return(w); }; };
}
"""


def test_no_two_branches_share_a_stream() -> None:
    """Law 2: siblings, calls and rounds of a loop that see the same text draw different tokens."""
    (result,) = run(ROOMY, [Plan(parse_text(APART), {})], seed=3)
    texts = [event.ids for event in result.events if isinstance(event, GenEnded)]
    assert len(texts) == 8
    assert len(set(texts)) == 8


def test_the_seed_and_the_inputs_place_matter() -> None:
    """Law 2: another seed, or another place among the inputs, is another stream; the same ones are the same."""
    program = parse_text('main = plan() { x = gen("A", max=8, temperature=5); }')
    engine = Engine(model(), ROOMY)
    first, second = engine.run(program, [{}, {}], seed=1)
    again, other = engine.run(program, [{}], seed=1)[0], engine.run(program, [{}], seed=2)[0]
    assert drawn(first) == drawn(again)
    assert drawn(first) != drawn(second)
    assert drawn(first) != drawn(other)


def test_a_join_may_be_by_what_a_branch_is_given() -> None:
    """The index of a fork, and the index and item of a map, are keys that every branch has."""
    text = """
    go = plan() {
      a = fork(i: 3) { x = gen("n", max=3); return(x); } join(quorum(1, i));
      b = map(k, s: ["3", "4", "3"]) { x = gen("n", max=3); return(x); } join(vote(s), drop);
      c = fork(i: 3) { x = gen("n", max=3); return(i); } join(best(i), stitch);
      d = map(k, s: ["3", "4"]) { x = gen("n", max=3); return(k); } join(best(k), stitch);
      return([b, "#{a} #{c} #{d}"]);
    }
    """
    plan = Plan.parse(text)
    [result] = run(ROOMY, [plan], seed=3)
    assert result.value == ["3", "0 2 1"]
    hold_against_reference(plan, result)
