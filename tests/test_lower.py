"""Lowering, the passes, and the graph's verifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from anabranch.compiler.graph import Cond, Decode, Fork, Graph, Loop, Map, PlanGraph, Reduce, Region, Return, Write
from anabranch.compiler.graph_text import graph_text
from anabranch.compiler.lower import lower
from anabranch.compiler.pipeline import NEVER, compile_plan
from anabranch.compiler.show import show
from anabranch.compiler.simplify import drop_dead_arms, drop_unreached, fold_constants, merge_arms
from anabranch.compiler.verify_graph import VerifyError, verify_graph
from anabranch.dsl.ast import Binary, Int
from anabranch.dsl.check import check
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.parse import parse_text
from anabranch.dsl.spec import GenType

VOTE = """
solve = plan(problem, budget=8000) {
  user("#{problem}");
  answer = fork(4) {
    work = gen(max=1500, temperature=0.9);
    ans = gen("Final answer: ", type=int, max=12);
    return(ans);
  } join(vote(ans), stitch);
  why = gen("Because ", max=80);
  return([answer, why]);
}
"""


def graph_of(text: str, name: str | None = None) -> Graph:
    return verify_graph(lower(check(parse_text(text)), name))


def main(graph: Graph) -> PlanGraph:
    return graph.plans[graph.main]


def test_vote_as_text() -> None:
    """A plan's graph reads like the plan, one line a node."""
    assert (
        show(parse_text(VOTE), "graph")
        == """\
solve = plan(problem) budget=8000 region(%0) {
  %1 = write %0 user "#{problem}"
  %5 = fork %1 join=vote(ans),stitch  # answer {
    arm x4 region(%2) {
      %3 = decode %2 max=1500 temperature=0.9 text  # work
      %4 = decode %3 "Final answer: " max=12 int  # ans
      return ans
    }
  }
  %6 = decode %5 "Because " max=80 text  # why
  return [answer, why]
}"""
    )


def test_sites_are_unique_across_arms() -> None:
    """Unnamed statements of the arms of an `if` have other sites than those of the block around it."""
    graph = graph_of("""
p = plan(q) {
  text("a"); if (q == "x") { text("b"); fork(2) { text("c"); }; } else { text("d"); }; fork(2) { text("e"); };
}
""")
    region = main(graph).region
    cond = region.nodes[1]
    assert isinstance(cond, Cond) and cond.orelse is not None
    inner = [node.site for node in (*cond.then.nodes, *cond.orelse.nodes)]
    assert inner == ["if1.text0", "if1.fork1", "else1.text0"]
    assert [node.site for node in region.nodes] == ["text0", "if1", "fork2"]


def test_space_is_held_before_a_gen_that_goes_on() -> None:
    """A text, and a branch's prompt, hold back a space only directly before a gen without a prompt."""
    graph = graph_of("""
p = plan() {
  text("a "); x = gen(max=2); text("b "); y = gen("c", max=2);
  fork() { u = branch("d ") { v = gen(max=2); return(v); }; w = branch("e ") { text("f"); }; };
}
""")
    nodes = main(graph).region.nodes
    assert [node.hold_space for node in nodes if isinstance(node, Write)] == [True, False]
    assert isinstance(nodes[-1], Fork)
    assert [arm.hold_space for arm in nodes[-1].arms] == [True, False]


def test_widths_come_from_the_checker() -> None:
    """A map over lines is as wide as its lines, a reduce over it as many, and `upto` bounds a width the run decides."""
    graph = graph_of("""
p = plan(n: int) {
  xs = gen("List:", type=lines(2, 6), max=60);
  ys = map(x: xs) { y = gen("#{x}", max=4); return(y); };
  z = reduce(g: ys, by=3) { r = gen("#{g}", max=4); return(r); };
  v = fork(n, upto=5) { r = gen("x", max=4); return(r); };
  return([z, v]);
}
""")
    _, mapped, reduced, forked, _ = main(graph).region.nodes
    assert isinstance(mapped, Map) and mapped.most == 6
    assert isinstance(reduced, Reduce) and (reduced.most, reduced.by) == (6, 3)
    assert isinstance(forked, Fork) and forked.width is not None and forked.arms[0].multiplicity == 5


def test_a_loop_carries_what_it_rebinds() -> None:
    """A name of the block around that the body binds again is carried; the body's own names are not."""
    graph = graph_of("""
p = plan() { x = gen("a", max=2); loop(3) { y = gen("b", max=2); if (y == "z") { x = gen("c", max=2); }; }; return(x); }
""")
    loop = main(graph).region.nodes[1]
    assert isinstance(loop, Loop) and loop.carried == ("x",)


def test_called_plans_come_along() -> None:
    """The graph holds the plans that the main one reaches, and no others."""
    graph = graph_of("""
a = plan(q) { x = gen("#{q}", max=2); return(x); }
b = plan(q) { x = a(q); return(x); }
c = plan(q) { x = gen("#{q}", max=2); return(x); }
d = plan(q) { x = b(q); return(x); }
""")
    assert set(graph.plans) == {"a", "b", "d"}


def test_constants_are_folded_and_dead_arms_dropped() -> None:
    """A condition that needs no run leaves the arm that it takes, in its place."""
    graph = graph_of("""
p = plan() {
  text("a"); if (1 + 1 == 2) { text("b"); x = gen(max=3); } else { text("c"); }; if (false) { text("d"); }; text("e");
}
""")
    done = verify_graph(drop_dead_arms(fold_constants(graph)))
    assert [type(node) for node in main(done).region.nodes] == [Write, Write, Decode, Write]
    assert "(1 + 1)" in graph_text(graph)


def test_a_fold_that_fails_is_left_for_the_run() -> None:
    """A division by zero is the run's failure, not the compiler's."""
    graph = graph_of("p = plan() { x = 1 + 1; return(x); }")
    plan = main(graph)
    by_zero = replace(plan.region.nodes[0], value=Binary("/", Int(1), Int(0)))  # type: ignore[call-arg]
    region = replace(plan.region, nodes=(by_zero, *plan.region.nodes[1:]))
    odd = Graph(graph.main, {plan.name: replace(plan, region=region)})
    assert fold_constants(odd) == odd


def test_an_arm_whose_name_comes_again_stays() -> None:
    """A dead condition is kept where putting its arm in its place would bind a name twice."""
    graph = graph_of('p = plan() { if (true) { x = gen("a", max=3); }; x = gen("b", max=4); return(x); }')
    assert isinstance(main(drop_dead_arms(graph)).region.nodes[0], Cond)


def test_what_stands_after_return_is_dropped() -> None:
    """A `return` ends its region, and so does a condition both of whose arms return."""
    graph = graph_of("""
p = plan(q) { text("a"); if (q == "x") { return(1); } else { return(2); }; text("b"); y = gen(max=3); }
""")
    region = main(verify_graph(drop_unreached(graph))).region
    assert [type(node) for node in region.nodes] == [Write, Cond]


def test_equal_arms_in_a_row_are_one() -> None:
    """Equal unlabelled branches become one arm with a multiplicity; labelled and other ones stay."""
    graph = graph_of("""
p = plan() {
  x = fork() { branch("a") { y = gen(max=3); return(y); }; branch("a") { y = gen(max=3); return(y); };
    branch("a") { y = gen(max=4); return(y); }; branch("a") { y = gen(max=3); return(y); }; };
  z = fork() { u = branch("a") { y = gen(max=3); return(y); }; v = branch("a") { y = gen(max=3); return(y); }; };
  return([x, z]);
}
""")
    forks = [node for node in main(verify_graph(merge_arms(graph))).region.nodes if isinstance(node, Fork)]
    assert [[arm.multiplicity for arm in node.arms] for node in forks] == [[2, 1, 1], [1, 1]]


def broken(change: Callable[[Region], Region]) -> Graph:
    graph = graph_of(VOTE)
    plan = main(graph)
    return Graph(graph.main, {plan.name: replace(plan, region=change(plan.region))})


def _fork(region: Region) -> Fork:
    node = region.nodes[1]
    assert isinstance(node, Fork)
    return node


def _with_fork(region: Region, **changes: object) -> Region:
    node = replace(_fork(region), **changes)  # type: ignore[arg-type]
    return replace(region, nodes=(region.nodes[0], node, *region.nodes[2:]))


FAULTS: list[tuple[str, Callable[[Region], Region]]] = [
    ("one-producer", lambda r: replace(r, nodes=(r.nodes[0], *r.nodes))),
    ("used-once", lambda r: replace(r, nodes=(r.nodes[0], *r.nodes[2:]))),
    ("used-once", lambda r: replace(r, exit=1)),
    ("sites-unique", lambda r: _with_fork(r, site="user0")),
    ("bounds-present", lambda r: _with_fork(r, arms=(replace(_fork(r).arms[0], multiplicity=0),))),
    ("joins-possible", lambda r: _with_fork(r, join=replace(_fork(r).join, kind="first", key=None, count=5))),
    ("joins-possible", lambda r: _with_fork(r, limits=replace(_fork(r).limits, fresh=True))),
    ("keys-bound", lambda r: _with_fork(r, join=replace(_fork(r).join, key="nothing"))),
    ("names-defined", lambda r: replace(r, nodes=(*r.nodes[:1], replace(r.nodes[2], src=1), r.nodes[3]), exit=6)),
    ("width-of-one-arm", lambda r: _with_fork(r, width=Int(2), arms=_twice(r))),
    ("space-held", lambda r: replace(r, nodes=(replace(r.nodes[0], hold_space=True), *r.nodes[1:]))),
]


def _twice(region: Region) -> tuple[object, ...]:
    arm = _fork(region).arms[0]
    entry, exit = arm.region.entry + 100, arm.region.exit + 100
    nodes = tuple(
        node if isinstance(node, Return) else replace(node, src=node.src + 100, dst=node.dst + 100)  # type: ignore[union-attr]
        for node in arm.region.nodes
    )
    return arm, replace(arm, region=Region(entry, nodes, exit))


@pytest.mark.parametrize(("rule", "change"), FAULTS)
def test_the_verifier_names_the_rule(rule: str, change: Callable[[Region], Region]) -> None:
    """Each rule catches a graph that breaks it, by name, and shows the nodes around."""
    with pytest.raises(VerifyError) as caught:
        verify_graph(broken(change))
    assert caught.value.rule == rule
    assert "region(%" in str(caught.value)


def test_calls_must_end() -> None:
    """Plans that call each other in a circle are caught, whatever let them through."""
    graph = graph_of("""
a = plan(q) { x = gen("#{q}", max=2); return(x); }
b = plan(q) { x = a(q); return(x); }
""")
    looped = Graph("b", {**graph.plans, "a": replace(graph.plans["b"], name="a")})
    with pytest.raises(VerifyError) as caught:
        verify_graph(looped)
    assert caught.value.rule == "calls-end"


@pytest.mark.parametrize(
    ("body", "needs"),
    [
        ('text("x"); a = gen(max=1, type=int);', 3),
        ('text("x "); a = gen(max=1, type=int);', 2),
        ('a = gen("x", max=2, type=int);', 3),
        ('a = gen("x#{q} ", max=1, type=int);', 2),
        ('a = gen("x#{q}", max=1, type=int);', 2),
        ('user("x "); a = gen(max=2, type=int);', 3),
        ('if (q == "") { text("x"); }; a = gen(max=1, type=int);', 2),
    ],
)
def test_a_max_below_its_type_is_told(body: str, needs: int) -> None:
    """Where the run alone knows of a held-back space, the shorter of the two lengths is asked for."""

    def least_tokens(kind: GenType, *, held_space: bool) -> int:
        return 2 if held_space else 3

    compiled = compile_plan(parse_text(f"p = plan(q) {{ {body} return(a); }}"))
    with pytest.raises(PlanError) as caught:
        compiled.check_least(least_tokens)
    (found,) = caught.value.diagnostics
    assert found.code == "max-too-small" and found.help == f"write `max={needs}` or more"
    assert found.span is not None and "gen(" in compiled.program.source.text[found.span.start : found.span.end]


@pytest.mark.parametrize(
    "gen",
    [
        'gen("x", max=3, type=int)',
        'gen("x", max=1)',
        'gen("x", max=1, type=int, recorded="12345")',
        'gen("x", max=1, type=choice("a", "b", by="logprob"))',
    ],
)
def test_a_max_is_no_matter_where_nothing_is_drawn_by_type(gen: str) -> None:
    """A gen of text, a recorded one and a scored choice have no least length."""
    compile_plan(parse_text(f"p = plan() {{ a = {gen}; return(a); }}")).check_least(lambda kind, *, held_space: 3)


def test_a_type_that_cannot_be_is_shown_where_it_stands() -> None:
    """No tokens make its value, or the mask engine refuses it: told before the run, at the gen."""
    compiled = compile_plan(parse_text('p = plan() { a = gen("x", max=3, type=regex("a")); return(a); }'))

    def refuse(kind: GenType, *, held_space: bool) -> int:
        raise PlanError(Diagnostic("bad-regex", "no"))

    for least_tokens, code in ((lambda kind, *, held_space: NEVER, "impossible-type"), (refuse, "bad-regex")):
        with pytest.raises(PlanError) as caught:
            compiled.check_least(least_tokens)
        (found,) = caught.value.diagnostics
        assert found.code == code and found.span is not None and found.span.start > 0


def test_compiled_says_whether_logprobs_are_read() -> None:
    """`best(logprob)` is what makes a run keep log-probabilities."""
    text = 'p = plan() {{ x = fork(2) {{ y = gen("a", max=3); return(y); }} join({}, drop); return(x); }}'
    assert compile_plan(parse_text(text.format("best(logprob)"))).reads_logprobs
    assert not compile_plan(parse_text(text.format("first(1)"))).reads_logprobs
