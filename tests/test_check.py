"""The checker: each code has a plan that earns it and a near miss that does not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

import anabranch.dsl
from anabranch.dsl import ast
from anabranch.dsl.check import Checked, Target, check
from anabranch.dsl.check_report import MAX_ERRORS
from anabranch.dsl.diagnostics import PlanError, Source
from anabranch.dsl.parse import parse, parse_text
from anabranch.dsl.types import ANY, INT, TEXT, ListOf, Record, Text

FUNCTIONS = ("score", "fetch")


def run(text: str, *, target: Target | None = None, start_token: bool | None = None) -> Checked:
    """Check a plan, or the body of one."""
    whole = text if "= plan(" in text else f"p = plan(q) {{ {text} }}"
    return check(parse_text(whole), functions=FUNCTIONS, target=target, start_token=start_token)


def codes(text: str, *, target: Target | None = None, start_token: bool | None = None) -> list[str]:
    """The codes of errors, or of warnings where there is no error."""
    try:
        return [w.code for w in run(text, target=target, start_token=start_token).warnings]
    except PlanError as error:
        return [d.code for d in error.diagnostics]


ERRORS = {
    # names
    "undefined-name": ("return(qq);", "return(q);"),
    "used-before-bound": ("text(x); x = gen(max=3); return(x);", 'text("a"); x = gen(max=3); text(x);'),
    "sibling-name": (
        'p = fork() { a = branch("a") { x = gen(max=3); }; b = branch("b") { text(x); }; }; return(p);',
        'x = gen("a", max=3); p = fork() { a = branch("a") { text(x); }; b = branch("b") { text(x); }; }; return(p);',
    ),
    "leaked-name": (
        'y = fork(2) { x = gen("a", max=3); }; return([x, y]);',
        'y = fork(2) { x = gen("a", max=3); return(x); }; return(y);',
    ),
    "maybe-unbound": (
        'if (q == "a") { x = 1; }; return(x);',
        'if (q == "a") { x = 1; } else { x = 2; }; return(x);',
    ),
    "plan-too-large": (
        "loop(1000000) { loop(1000000) { y = 1; }; };",
        "loop(1000) { loop(10000) { y = 1; }; };",
    ),
    "bound-twice": ("x = 1; x = 2;", "x = 1; y = 2;"),
    "shadowed-name": (
        'x = 1; y = fork(2) { x = gen("a", max=3); }; return(y);',
        'y = fork(2) { x = gen("a", max=3); }; x = 1; return(y);',
    ),
    "reserved-word": ("fork = 1;", "forks = 1;"),
    "rebound-type": (
        'x = 1; loop(3) { x = q + "a"; }; return(x);',
        "x = 1; loop(3) { x = x + 1; }; return(x);",
    ),
    "arm-types": (
        'if (q == "a") { x = 1; } else { x = "b"; }; return(x);',
        'if (q == "a") { x = 1; } else { x = 1.5; }; return(x);',
    ),
    # gens
    "missing-max": ('gen("a");', 'p = plan(q, max=4) { gen("a"); }'),
    "unknown-option": ('gen("a", max=3, sotp="x");', 'gen("a", max=3, stop="x");'),
    "unknown-type": ('gen("a", max=3, type=integer);', 'gen("a", max=3, type=int);'),
    "bad-type": ('gen("a", max=3, type=int(3));', 'gen("a", max=3, type=int);'),
    "bad-lines": ('gen("a", max=30, type=lines(3, 2));', 'gen("a", max=30, type=lines(2, 3));'),
    "bad-choice": ('gen("a", max=3, type=choice("a", "a"));', 'gen("a", max=3, type=choice("a", "b"));'),
    "bad-regex": ('gen("a", max=3, type=regex("(a"));', 'gen("a", max=3, type=regex("(a)"));'),
    "bad-schema": (
        """gen("a", max=3, type=json('{"type": "wat"}'));""",
        """gen("a", max=3, type=json('{"type": "object"}'));""",
    ),
    "max-too-small": ('gen("a", max=2, type=lines(2, 3));', 'gen("a", max=3, type=lines(2, 3));'),
    "stop-on-type": ('gen("a", max=3, type=int, stop="x");', 'gen("a", max=3, type=text, stop="x");'),
    "bad-recorded": ('gen("a", max=3, recorded=3);', 'gen("a", max=3, recorded=ids(3));'),
    "not-constant": ('gen("a", max=len(q));', 'gen("a", max=2 * 3);'),
    "option-type": ('gen("a", max=true);', 'gen("a", max=1);'),
    "option-range": ('gen("a", max=0);', 'gen("a", max=1);'),
    "bad-bound": ("p = plan(q: wat) { text(q); }", "p = plan(q: text(20)) { text(q); }"),
    # forks and joins
    "unbound-key": (
        'x = fork(2) { if (q == "a") { k = 1; }; } join(vote(k), drop); return(x);',
        'x = fork(2) { if (q == "a") { k = 1; } else { k = 2; }; } join(vote(k), drop); return(x);',
    ),
    "best-key": (
        'x = fork(2) { k = gen("a", max=3); return(1); } join(best(k), drop); return(x);',
        'x = fork(2) { k = gen("a", max=3, type=int); return(1); } join(best(k), drop); return(x);',
    ),
    "key-type": (
        "x = fork() { a = branch() { k = 1; }; b = branch() { k = true; }; } join(vote(k), drop); return(x);",
        "x = fork() { a = branch() { k = 1; }; b = branch() { k = 1.5; }; } join(vote(k), drop); return(x);",
    ),
    "branch-types": (
        'x = fork() { a = branch() { return(1); }; b = branch() { return("b"); }; } join(first(1), drop); return(x);',
        'x = fork() { a = branch() { return(1); }; b = branch() { return("b"); }; } join(all, drop); return(x);',
    ),
    "mixed-labels": (
        "x = fork() { a = branch() { return(1); }; branch() { return(1); }; }; return(x);",
        "x = fork() { branch() { return(1); }; branch() { return(1); }; }; return(x);",
    ),
    "count-above-width": (
        "x = fork(2) { return(1); } join(first(3), drop); return(x);",
        "x = fork(2) { return(1); } join(first(2), drop); return(x);",
    ),
    "unbounded-width": (
        "x = fork(len(q)) { return(1); }; return(x);",
        "x = fork(len(q), upto=4) { return(1); }; return(x);",
    ),
    "stitch-fresh": (
        'x = fork(2, fresh=true) { gen("a", max=3); } join(all, stitch); return(x);',
        'x = fork(2, fresh=true) { gen("a", max=3); } join(all, text); return(x);',
    ),
    "role-mismatch": (
        'user(q); x = fork(2) { gen(max=3); user("b"); } join(all, stitch); return(x);',
        'user(q); x = fork(2) { gen(max=3); user("b"); gen(max=3); } join(all, stitch); return(x);',
    ),
    "nothing-to-continue": (
        'text("a"); x = fork(2) { gen(max=3); } join(all, stitch); gen(max=3); return(x);',
        'text("a"); x = fork(2) { gen(max=3); } join(first(1), stitch); gen(max=3); return(x);',
    ),
    "fallback-type": (
        'x = fork(2, fallback="none") { return(1); } join(first(1), drop); return(x);',
        "x = fork(2, fallback=0) { return(1); } join(first(1), drop); return(x);",
    ),
    "budget-above-parent": (
        'p = plan(q, budget=50) { x = fork(2, budget=60) { gen("a", max=3); }; return(x); }',
        'p = plan(q, budget=60) { x = fork(2, budget=60) { gen("a", max=3); }; return(x); }',
    ),
    "reduce-by": (
        "x = reduce(g: [1, 2], by=1) { return(1); }; return(x);",
        "x = reduce(g: [1, 2], by=2) { return(1); }; return(x);",
    ),
    "reduce-type": (
        'x = reduce(g: [1, 2]) { return("a"); }; return(x);',
        'x = reduce(g: ["b", "c"]) { return("a"); }; return(x);',
    ),
    "expand-unavailable": ('x = expand("a", max=3, depth=1);', 'x = gen("a", max=3);'),
    # plans
    "plan-order": (
        "a = plan(q) { x = b(q); return(x); } b = plan(q) { return(q); }",
        "b = plan(q) { return(q); } a = plan(q) { x = b(q); return(x); }",
    ),
    "recursion-without-depth": (
        "a = plan(q) { x = a(q); return(x); }",
        "a = plan(q, depth=2) { x = a(q); return(x); }",
    ),
    "bad-call": (
        "b = plan(q) { return(q); } a = plan(q) { x = b(q, q); return(x); }",
        "b = plan(q) { return(q); } a = plan(q) { x = b(q); return(x); }",
    ),
    "argument-type": (
        'b = plan(q: int) { return(q); } a = plan(q) { x = b("a"); return(x); }',
        "b = plan(q: int) { return(q); } a = plan(q) { x = b(3); return(x); }",
    ),
    "plan-in-expression": (
        "b = plan(q) { return(1); } a = plan(q) { x = 1 + b(q); return(x); }",
        "b = plan(q) { return(1); } a = plan(q) { y = b(q); x = 1 + y; return(x); }",
    ),
    # expressions
    "wrong-operand": ('x = 1 - "a";', "x = 1 - 2;"),
    "compare-types": ('x = 1 == "a";', "x = 1 == 1.5;"),
    "no-such-field": (
        "x = fork() { a = branch() { return(1); }; b = branch() { return(1); }; }; return(x.c);",
        "x = fork() { a = branch() { return(1); }; b = branch() { return(1); }; }; return(x.a);",
    ),
    "index-out-of-range": ("x = [1, 2]; return(x[2]);", "x = [1, 2]; return(x[1]);"),
    "division-by-zero": ("x = 1 / 0;", "x = 1 / 2;"),
    "unknown-function": ("x = scor(q);", "x = score(q);"),
    "misplaced-type": ('x = choice("a");', 'x = gen("a", max=3, type=choice("a"));'),
}

WARNINGS = {
    "vote-on-text": (
        'x = fork(2) { k = gen("a", max=3); } join(vote(k), drop); return(x);',
        'x = fork(2) { k = gen("a", max=3); } join(vote(k, by=exact), drop); return(x);',
    ),
    "best-without-draw": (
        'x = fork(2) { gen("a", max=3, recorded="b"); } join(best(logprob), drop); return(x);',
        'x = fork(2) { if (q == "a") { gen("a", max=3); }; } join(best(logprob), drop); return(x);',
    ),
    "fork-of-one": ("x = fork(1) { return(1); }; return(x);", "x = fork(2) { return(1); }; return(x);"),
    "unused-join": ("x = fork(2) { return(1); }; return(q);", "x = fork(2) { return(1); }; return(x);"),
    "unreachable": ("return(q); text(q);", 'if (q == "a") { return(q); }; text(q);'),
    "budget-below-worst": (
        'p = plan(q, budget=19) { x = fork(2) { gen("a", max=10); }; return(x); }',
        'p = plan(q, budget=20) { x = fork(2) { gen("a", max=10); }; return(x); }',
    ),
}


@pytest.mark.parametrize("code", [*ERRORS, *WARNINGS])
def test_each_code_is_earned_and_nearly_missed(code: str) -> None:
    """A plan with one mistake earns its code once; the plan beside it, without the mistake, earns nothing."""
    bad, good = (ERRORS | WARNINGS)[code]
    assert codes(bad) == [code]
    assert codes(good) == []


def test_key_error_renders_as_documented() -> None:
    """The error of a branch that never binds the join's key shows the label and a gen that would do."""
    text = (
        "race = plan(problem) {\n"
        '  user("#{problem}");\n'
        "  p = fork() {\n"
        '  algebra = branch("Use algebra.") { w = gen(max=900); ans = gen(type=int, max=12); };\n'
        '  cases = branch("Enumerate.") { w = gen(max=900); };\n'
        "  } join(vote(ans), stitch);\n"
        "  return(p);\n"
        "}\n"
    )
    with pytest.raises(PlanError) as caught:
        check(parse(Source("race.plan", text)))
    assert caught.value.render() == (
        "error[unbound-key]: `vote(ans)` needs `ans` in every branch\n"
        " --> race.plan:5:3\n"
        "  |\n"
        '5 |   cases = branch("Enumerate.") { w = gen(max=900); };\n'
        "  |   ^^^^^ never binds `ans`\n"
        "help: add `ans = gen(type=int, max=12);`"
    )


def test_many_errors_are_told_at_once_and_capped() -> None:
    """Every mistake of a plan is told, in order of the text, up to a cap."""
    assert codes('x = 1; x = 2; gen("a"); return(qq);') == ["bound-twice", "missing-max", "undefined-name"]
    assert len(codes("".join(f"text(a{i});" for i in range(500)))) == MAX_ERRORS


def test_one_mistake_is_told_once() -> None:
    """A value whose type is unknown after a mistake raises no further error where it is used."""
    assert codes('x = wat(q); y = x + 1; z = "#{y.a[3]}"; need(x); return(z);') == ["unknown-function"]


def test_plan_errors_are_not_repeated_in_gens() -> None:
    """A plan's own wrong `max` is told at the plan and not at each gen that inherits it."""
    assert codes('p = plan(q, max=0) { gen("a"); gen("b"); }') == ["option-range"]


def test_undefined_name_suggests() -> None:
    """A misspelt name is answered with the nearest one in scope, and a label with the field that holds its value."""
    with pytest.raises(PlanError) as caught:
        run("problem = 1; return(probelm);")
    assert caught.value.diagnostics[0].help == "did you mean `problem`?"
    with pytest.raises(PlanError) as caught:
        run("x = fork() { left = branch() { return(1); }; right = branch() { return(2); }; }; return([left, x]);")
    assert caught.value.diagnostics[0].code == "undefined-name"
    assert "`x.left`" in caught.value.diagnostics[0].help


def test_unknown_function_suggests() -> None:
    """A misspelt host function is answered with the registered one."""
    with pytest.raises(PlanError) as caught:
        run("x = socre(q);")
    assert caught.value.diagnostics[0].help == "did you mean `score`?"


def test_loop_names_are_seen_by_until_and_after() -> None:
    """What a loop binds is visible in `until` and after; binding it again after is binding it twice."""
    body = 'text(q); loop(3) { ok = gen("?", max=2, type=choice("y", "n")); } until(ok == "y");'
    assert codes(body + " return(ok);") == []
    assert codes(body + " ok = 1;") == ["bound-twice"]
    assert codes("loop(3) { x = 1; x = 2; };") == ["bound-twice"]


def test_loop_in_a_branch_cannot_change_the_parent() -> None:
    """A loop may rebind names of its own thread, not those outside its branch."""
    assert codes("n = 0; x = fork(2) { loop(2) { n = n + 1; }; return(n); }; return(x);") == ["shadowed-name"]
    assert codes("x = fork(2) { n = 0; loop(2) { n = n + 1; }; return(n); }; return(x);") == []


def test_rebinding_inside_an_arm_of_a_loop() -> None:
    """An arm inside a loop may rebind what was bound before the loop, and not what the body bound before the arm."""
    assert codes('n = 0; loop(2) { if (q == "a") { n = n + 1; }; }; return(n);') == []
    assert codes('loop(2) { n = 0; if (q == "a") { n = 1; }; };') == ["bound-twice"]


def test_a_loop_may_not_lengthen_a_list() -> None:
    """A carried list keeps the bound that statements earlier in the body were told of."""
    gen = 'gen("a", max=40, type=lines(1, {}))'
    body = "xs = {}; loop(2) {{ m = map(x: xs) {{ return(x); }}; xs = {}; }}; return([m, xs]);"
    assert codes(body.format(gen.format(3), gen.format(3))) == []
    assert codes(body.format(gen.format(3), gen.format(4))) == ["rebound-type"]


def test_key_must_be_bound_before_an_early_return() -> None:
    """A `return` before the key is bound leaves it unbound on that path."""
    body = "x = fork(2) {{ {} k = 1; return(k); }} join(vote(k), drop); return(x);"
    assert codes(body.format('if (q == "a") { return(0); };')) == ["unbound-key"]
    assert codes(body.format('if (q == "a") { need(false); };')) == []


def test_keys_are_not_taken_from_outside() -> None:
    """A name of the parent is no key; the index that a fork binds in each branch is."""
    assert codes("k = 1; x = fork(2) { return(1); } join(vote(k), drop); return(x);") == ["unbound-key"]
    assert codes("x = fork(i: 2) { return(i); } join(best(i), drop); return(x);") == []


def test_logprob_needs_no_binding() -> None:
    """`best(logprob)` is built in, and no name may take its place."""
    assert codes('x = fork(2) { gen("a", max=3); } join(best(logprob), drop); return(x);') == []
    scored = 'gen("a", max=3, type=choice("b", "c", by="logprob"));'
    assert codes(f"x = fork(2) {{ {scored} }} join(best(logprob), drop); return(x);") == ["best-without-draw"]
    assert codes("logprob = 1;") == ["reserved-word"]


def test_number_votes_may_mix_types() -> None:
    """Under `by=number` branches may bind the key to text or numbers: what is no number casts no vote."""
    body = 'x = fork() {{ a = branch() {{ k = 1; }}; b = branch() {{ k = "1"; }}; }} join(vote(k{})); return(x);'
    assert codes(body.format(", by=number")) == []
    assert codes(body.format("")) == ["key-type"]


def test_target_without_stitch_of_several() -> None:
    """A target that cannot alias several branches refuses exactly the joins that would."""
    remote = Target("vllm", stitch_many=False)
    body = "text(q); x = fork(2) {{ k = gen(max=3, type=int); }} join({}, stitch); return(x);"
    refused = {"all": True, "first(2)": True, "first(1)": False, "vote(k)": False, "best(k)": False}
    for value, is_refused in refused.items():
        assert codes(body.format(value), target=remote) == (["stitch-many"] if is_refused else [])
    assert codes(body.format("all")) == []


def test_deterministic_target_refuses_deadlines() -> None:
    """A wall-clock deadline does not go with a deterministic run."""
    body = 'x = fork(2, deadline="1s") { return(1); }; return(x);'
    assert codes(body, target=Target(deterministic=True)) == ["wall-clock"]
    assert codes(body) == []


def test_start_token_decides_an_empty_view() -> None:
    """A `gen` without a prompt in an empty view needs a start token; without a model, check says it skipped this."""
    assert codes("gen(max=3);", start_token=False) == ["nothing-to-continue"]
    assert codes("gen(max=3);", start_token=True) == []
    checked = run("gen(max=3);")
    assert [("start" in s or "model" in s) for s in checked.skipped] == [True]
    assert run('gen("a", max=3);').skipped == ()


def test_what_is_recorded_needs_nothing_to_continue() -> None:
    """A recorded gen draws nothing; what follows continues it, unless it is empty."""
    assert codes('gen(recorded="a", max=3); gen(max=3);', start_token=False) == []
    assert codes('gen(recorded="", max=3); gen(max=3);', start_token=False) == ["nothing-to-continue"]
    after = (
        'text("a"); x = fork(2) {{ gen(max=3); }} join(all, stitch); gen(recorded={}, max=3); gen(max=3); return(x);'
    )
    assert codes(after.format('["b"]')) == []
    assert codes(after.format('""')) == ["nothing-to-continue"]


def test_fresh_children_begin_empty() -> None:
    """A fresh branch does not continue its parent's text."""
    body = 'text("a"); x = fork(2{}) {{ gen(max=3); }}; return(x);'
    assert codes(body.format(", fresh=true"), start_token=False) == ["nothing-to-continue"]
    assert codes(body.format(""), start_token=False) == []


def test_a_held_space_is_nothing_to_continue() -> None:
    """A prompt of one space is held back and leaves nothing in the context; of two, one."""
    after = 'text("a"); x = fork(2) {{ gen(max=3); }} join(all, stitch); {} return(x);'
    assert codes(after.format('gen(" ", max=3);')) == ["nothing-to-continue"]
    assert codes(after.format('gen("  ", max=3);')) == []
    assert codes(after.format('text(" "); gen(max=3);')) == ["nothing-to-continue"]


def test_stitch_of_several_inside_a_loop() -> None:
    """What the end of a round leaves is what the next round begins with."""
    body = 'text("a"); loop(2) {{ g = gen(max=3); x = fork(2) {{ gen(max=3); }} join({}, stitch); }}; return([g, x]);'
    assert codes(body.format("all")) == ["nothing-to-continue"]
    assert codes(body.format("first(1)")) == []


def test_called_plans_continue_their_caller() -> None:
    """A called plan's first gen continues the caller's context, so it is judged there and not alone."""
    plans = "b = plan() {{ gen(max=3); }} a = plan(q) {{ {} x = b(); return(x); }}"
    assert codes(plans.format('text("a");'), start_token=False) == []
    assert codes(plans.format(""), start_token=False) == ["nothing-to-continue"]
    stitched = 'text("a"); y = fork(2) { gen(max=3); } join(all, stitch); text(y);'
    assert codes(plans.format(stitched)) == []


def test_roles_are_those_on_every_path() -> None:
    """A branch that may end in another role on one path only is refused under `stitch`, and free under `drop`."""
    body = 'user(q); x = fork(2) {{ gen(max=3); if (q == "a") {{ user("b"); }}; }} join(first(1), {}); return(x);'
    assert codes(body.format("stitch")) == ["role-mismatch"]
    assert codes(body.format("drop")) == []


def test_types_of_joins() -> None:
    """Each join's value has the type that its rule gives."""
    fork = 'x = fork(3) { k = gen("a", max=3, type=int); return(q + "b"); } '
    expected = {
        "join(all)": ListOf(TEXT),
        "join(vote(k))": INT,
        "join(quorum(2, k))": INT,
        "join(best(k))": TEXT,
        "join(first(1))": TEXT,
        "join(first(2))": ListOf(TEXT),
    }
    for join, wanted in expected.items():
        assert run(f"{fork} {join}; return(x);").value_types["p"] == wanted
    labelled = "x = fork() { a = branch() { return(1); }; b = branch() { text(q); }; }; return(x);"
    assert run(labelled).value_types["p"] == Record((("a", INT), ("b", TEXT)))


def test_most_of_maps_and_reduces() -> None:
    """The most branches come from a type's bound, a parameter's, the width before, or `upto`."""
    text = (
        "p = plan(xs: list(9)) {\n"
        ' ls = gen("a", max=40, type=lines(2, 6));\n'
        " a = map(x: ls) { return(x); };\n"
        " b = map(x: xs) { return(1); };\n"
        " c = map(x: lines(ls[0]), upto=4) { return(x); };\n"
        " d = reduce(g: a, by=3) { return(g[0]); };\n"
        " e = fork(5) { return(1); } join(first(2));\n"
        " f = map(x: e) { return(x); };\n"
        " return([a, b, c, d, f]);\n}"
    )
    program = parse_text(text)
    checked = check(program)
    stmts = program.plans[0].body.stmts
    forks = [s for s in stmts if isinstance(s, ast.Map | ast.Reduce | ast.Fork)]
    assert [checked.most_of(s) for s in forks] == [6, 9, 4, 6, 5, 2]
    assert checked.params["p"] == (ListOf(ANY),)


def test_worst_tokens() -> None:
    """The worst case multiplies by widths, rounds, retries and depth, and a budget bounds it."""
    assert run('x = fork(4) { gen("a", max=10); loop(3) { gen("b", max=2); }; }; return(x);').worst_tokens["p"] == 64
    assert run('x = fork(4, retry=1) { gen("a", max=10); }; return(x);').worst_tokens["p"] == 80
    assert run('x = reduce(g: ["a", "b", "c", "d"], by=2) { gen("a", max=5); }; return(x);').worst_tokens["p"] == 15
    nested = "a = plan(q, depth=2) { gen(q, max=1); x = a(q); y = a(q); return([x, y]); }"
    assert run(nested).worst_tokens["a"] == 7
    assert run('p = plan(q, budget=5) { gen("a", max=10); }').worst_tokens["p"] == 5


def test_host_functions_give_any_value() -> None:
    """A host function's result goes with every operator, and maps over it need `upto`."""
    assert codes("x = fetch(q); need(x); return(x + 1);") == []
    assert codes("x = map(y: fetch(q)) { return(y); }; return(x);") == ["unbounded-width"]


def test_literal_text_votes_do_not_warn() -> None:
    """A vote on a choice is no vote on free text."""
    body = 'x = fork(2) { k = gen("a", max=3, type=choice("a", "b")); } join(vote(k)); return(x);'
    assert codes(body) == []
    assert run(body).value_types["p"] == Text()


def test_hand_built_programs() -> None:
    """What the parser never makes is still refused: a fork without branches, a call of no plan, an option twice."""
    empty = ast.Branches("x", (), (), None)
    stray = ast.Call("y", "nowhere", (), ())
    three = (ast.Option("max", ast.Int(1)), ast.Option("max", ast.Int(2)))
    twice = ast.Gen("z", ast.Str(("a",)), three)
    returned = ast.Return(ast.List((ast.Name("x"), ast.Name("y"))))
    program = ast.Program((ast.PlanDef("p", (), (), ast.Block((empty, stray, twice, returned))),))
    with pytest.raises(PlanError) as caught:
        check(program)
    assert [d.code for d in caught.value.diagnostics] == ["empty-fork", "unknown-plan", "repeated-option"]


def test_long_sums_do_not_overflow() -> None:
    """A left spine of 20,000 operators is walked, not recursed into."""
    total: ast.Expr = ast.Int(1)
    for _ in range(20_000):
        total = ast.Binary("+", total, ast.Int(1))
    body = ast.Block((ast.Let("x", total), ast.Gen("y", ast.Str(("a",)), (ast.Option("max", total),))))
    checked = check(ast.Program((ast.PlanDef("p", (), (), body),)))
    assert checked.worst_tokens["p"] == 20_001


def test_ten_thousand_branches_check_in_linear_time() -> None:
    """Distinct branches are checked without copying scopes: ten times as many take about ten times as long."""

    def seconds(n: int) -> float:
        branch = ast.Str(("go ",))
        gens = (
            ast.Gen("w", None, (ast.Option("max", ast.Int(20)),)),
            ast.Gen("a", ast.Str(("A: ",)), (ast.Option("max", ast.Int(9)), ast.Option("type", ast.Name("int")))),
            ast.Return(ast.Name("a")),
        )
        branches = tuple(ast.Branch(f"b{i}", branch, (), ast.Block(gens)) for i in range(n))
        value, context = ast.JoinValue("vote", key="a"), ast.JoinContext("stitch")
        fork = ast.Branches("x", (), branches, ast.Join(value, context))
        program = ast.Program((ast.PlanDef("p", (), (), ast.Block((fork, ast.Return(ast.Name("x"))))),))
        start = time.process_time()
        check(program)
        return time.process_time() - start

    seconds(100)
    assert seconds(10_000) < 40 * seconds(1_000) + 0.5


def test_every_code_is_documented() -> None:
    """Every code that the language's files can give has an entry in docs/errors.md."""
    folder = Path(anabranch.dsl.__file__).resolve().parent
    page = (folder.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^### `([a-z0-9-]+)`", page, re.MULTILINE))
    # In these files every kebab-case literal is a code, `utf-8` and the one-word code apart.
    found = {"unreachable"}
    for path in folder.glob("**/*.py"):
        found.update(re.findall(r'"([a-z0-9]+(?:-[a-z0-9]+)+)"', path.read_text(encoding="utf-8")))
    assert len(found) > 80
    assert found - {"utf-8"} - documented == set()
    assert set(ERRORS) | set(WARNINGS) <= documented
