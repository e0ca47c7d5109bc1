"""Options as written against the records they are read into."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import anabranch
from anabranch.dsl import ast
from anabranch.dsl.ast import Binary, Bool, Float, Gen, Int, Name, PlanDef, Unary
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.options import (
    const_int,
    fork_width,
    gen_spec,
    join_spec,
    limits,
    loop_rounds,
    parse_seconds,
    plan_depth,
    reduce_by,
)
from anabranch.dsl.parse import parse_text
from anabranch.dsl.patterns import MAX_EXPANDED, PatternTooComplex, check_regex, check_schema, full_match
from anabranch.dsl.spec import ChoiceType, GenSpec, IntType, JoinSpec, JsonType, Limits, LinesType, RegexType, TextType


def plan(text: str) -> PlanDef:
    return parse_text(text).plans[0]


def first(body: str, header: str = "p = plan()") -> tuple[ast.Stmt, PlanDef]:
    parsed = plan(f"{header} {{ {body} }}")
    return parsed.body.stmts[0], parsed


def spec(body: str, header: str = "p = plan()") -> GenSpec:
    stmt, parsed = first(body, header)
    assert isinstance(stmt, Gen)
    return gen_spec(stmt, parsed)


def codes(read: Callable[[], object]) -> list[str]:
    with pytest.raises(PlanError) as caught:
        read()
    return [d.code for d in caught.value.diagnostics]


def test_gen_options_are_read() -> None:
    """Every option of a gen lands in its field; what is unwritten has its default."""
    got = spec('gen(max=2 * 8, stop=["a", "b", "a"], temperature=0.5, top_k=3, seed=7, logprobs=2, recorded="x");')
    assert (got.type, got.max_tokens, got.stop) == (TextType(), 16, ("a", "b"))
    assert got.sampling == {"temperature": Float(0.5), "top_k": Int(3)}
    assert (got.seed, got.logprobs) == (Int(7), 2)
    assert got.recorded == ast.Str(("x",))
    plain = spec("gen(max=1);")
    assert (plain.stop, plain.sampling, plain.seed, plain.logprobs, plain.recorded) == ((), {}, None, 0, None)


def test_gens_inherit_from_their_plan() -> None:
    """`max` and the sampling options of a plan hold for gens that do not write their own."""
    header = "p = plan(q, max=9, temperature=0.1, budget=50)"
    assert spec("gen();", header).max_tokens == 9
    assert spec("gen(max=3, top_p=0.5);", header).max_tokens == 3
    assert spec("gen(temperature=0.9);", header).sampling == {"temperature": Float(0.9)}
    assert spec("gen(top_p=0.5);", header).sampling == {"temperature": Float(0.1), "top_p": Float(0.5)}


def test_types_are_read() -> None:
    """Each type of the language is read into its record."""
    assert spec("gen(max=3, type=int);").type == IntType()
    assert spec("gen(max=9, type=lines(1, 3));").type == LinesType(1, 3)
    assert spec('gen(max=9, type=choice("a", "b"));').type == ChoiceType(("a", "b"))
    assert spec('gen(max=9, type=choice("a", "b", by="logprob"));').type == ChoiceType(("a", "b"), "logprob")
    assert spec('gen(max=9, type=regex("[0-9]+"));').type == RegexType("[0-9]+")
    assert spec("gen(max=9, type=json('{}'));").type == JsonType("{}")


def test_all_mistakes_of_a_gen_are_told() -> None:
    """One reading tells of every wrong option."""
    body = 'gen(max=0, stop="", top_p=2, logprobs=99, type=choice("a", "", "a", "#{x}"));'
    found = codes(lambda: spec(body))
    assert sorted(found) == ["bad-choice"] * 3 + ["option-range"] * 4


@pytest.mark.parametrize(
    "written",
    [
        "max=0", "max=-1", "max=2147483648", "max=1.5", "max=true", 'max="3"', "max=[1]", "max=3/2", "max=1/0",
        "max=9, temperature=-0.1", "max=9, temperature=true", 'max=9, temperature="hot"', "max=9, top_p=0",
        "max=9, top_p=1.5", "max=9, top_k=-1", "max=9, top_k=1.5", "max=9, min_p=2", "max=9, repetition_penalty=0",
        "max=9, seed=-1", "max=9, seed=18446744073709551616", "max=9, logprobs=-1", "max=9, logprobs=21",
        "max=9, stop=3", "max=9, stop=[]", 'max=9, stop="#{x}"', "max=9, recorded=ids(-1)",
        "max=99999999999999999999 * 99999999999999999999", "max=9, type=lines(0, 3)", "max=9, type=lines(1, 9999999)",
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(written: str) -> None:
    """Zero, negative, huge, fractional and wrongly typed options are each told once."""
    assert codes(lambda: spec(f"gen({written});")) in (["option-range"], ["option-type"])


@pytest.mark.parametrize(
    "written",
    ["max=1", "max=2147483647", "max=3 - 2", "max=1, temperature=0", "max=1, top_p=1", "max=1, top_k=0",
     "max=1, min_p=0", "max=1, presence_penalty=-2", "max=1, seed=18446744073709551615", "max=1, logprobs=20",
     "max=1, temperature=t"],
)  # fmt: skip
def test_values_at_the_edge_are_taken(written: str) -> None:
    """The least and the largest values of each option are read."""
    assert spec(f"gen({written});").max_tokens >= 1


def test_constants() -> None:
    """Arithmetic of literals is a constant; anything with a name or call is not."""
    assert const_int(Binary("-", Binary("*", Int(3), Int(4)), Unary("-", Int(1)))) == 13
    assert codes(lambda: const_int(Name("x"))) == ["not-constant"]
    assert codes(lambda: const_int(Bool(True))) == ["option-type"]
    assert codes(lambda: const_int(Binary("+", Int(1), Bool(True)))) == ["option-type"]
    total: ast.Expr = Int(1)
    for _ in range(10_000):
        total = Binary("*", total, Int(10))
    assert codes(lambda: const_int(total)) == ["option-range"]


def test_limits_are_read() -> None:
    """The options of a fork land in their fields, a deadline in seconds."""
    stmt, _ = first('fork(4, limit=2, budget=9, deadline="500ms", fallback=1, fresh=true, retry=3) { };')
    assert isinstance(stmt, ast.Fork)
    assert limits(stmt.options, kind="fork") == Limits(2, None, 9, 0.5, Int(1), True, 3)
    assert limits((), kind="map") == Limits()
    assert limits(plan("p = plan(q, budget=5, depth=2, max=3, top_k=1) { }").options, kind="plan") == Limits(budget=5)


def test_options_belong_to_their_statement() -> None:
    """An option of another statement is refused, with what this one takes."""
    stmt, _ = first("fork(4, by=2) { };")
    assert isinstance(stmt, ast.Fork)
    with pytest.raises(PlanError) as caught:
        limits(stmt.options, kind="fork")
    assert "`limit`" in caught.value.diagnostics[0].help
    assert "`by`" not in caught.value.diagnostics[0].help
    assert codes(lambda: limits((ast.Option("upto", Int(2)),), kind="branches")) == ["unknown-option"]
    assert codes(lambda: limits((ast.Option("limit", Int(2)),), kind="branch")) == ["unknown-option"]
    assert codes(lambda: limits((ast.Option("fresh", Int(1)),), kind="fork")) == ["option-type"]


def test_deadlines() -> None:
    """Seconds are read from a number or a text with a unit, and nothing else."""
    assert [parse_seconds(t) for t in ("20s", "500ms", "2m", "1.5h", " 3s ")] == [20, 0.5, 120, 5400, 3]
    assert [parse_seconds(t) for t in ("", "s", "20", "20 s", "-1s", "1e3s", "nan s", "٣s", "1s2")] == [None] * 9
    number = (ast.Option("deadline", Float(1.5)),)
    assert limits(number, kind="fork").deadline_s == 1.5
    for value in (Int(0), Int(-1), ast.Str(("soon",)), Bool(True), ast.Str(("999999999h",))):
        assert len(codes(lambda v=value: limits((ast.Option("deadline", v),), kind="fork"))) == 1  # type: ignore[misc]


def test_joins_are_read() -> None:
    """A join's parts have their defaults where unwritten."""
    assert join_spec(None) == JoinSpec()

    def joined(text: str) -> JoinSpec:
        stmt, _ = first(f"fork(4) {{ }} {text};")
        assert isinstance(stmt, ast.Fork)
        return join_spec(stmt.join)

    assert joined("join(stitch(sum))") == JoinSpec(context="stitch", positions="sum")
    assert joined("join(all(min=2), text)") == JoinSpec(count=2, context="text")
    assert joined("join(quorum(1 + 1, x, by=number))") == JoinSpec("quorum", 2, "x", "number")
    assert codes(lambda: joined("join(first(0))")) == ["option-range"]
    assert codes(lambda: joined("join(first(n))")) == ["not-constant"]


def test_counts_of_statements() -> None:
    """Rounds, depth, width and the size of a merge are bounded constants; a width may be left to the run."""
    loop, _ = first("loop(3) { };")
    assert isinstance(loop, ast.Loop)
    assert loop_rounds(loop) == 3
    assert codes(lambda: loop_rounds(ast.Loop(Int(0), loop.body, None))) == ["option-range"]
    assert codes(lambda: loop_rounds(ast.Loop(Int(10**9), loop.body, None))) == ["option-range"]
    assert plan_depth(plan("p = plan(q) { }")) == 0
    assert plan_depth(plan("p = plan(q, depth=3) { }")) == 3
    assert codes(lambda: plan_depth(plan("p = plan(q, depth=0) { }"))) == ["option-range"]
    assert reduce_by(()) == 2
    assert reduce_by((ast.Option("by", Int(5)),)) == 5
    assert codes(lambda: reduce_by((ast.Option("by", Int(1)),))) == ["reduce-by"]
    fork, _ = first("fork(n) { };")
    assert isinstance(fork, ast.Fork)
    assert fork_width(fork) is None


HOSTILE = ["(a{1,1000}){1,1000}", "((a{1,100}){1,100}){1,100}", "(" * 5000 + ")" * 5000, "a{99999}", "a" * 20_000]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_are_refused_at_once(pattern: str) -> None:
    """Patterns that would grow without bound are refused before any automaton is built."""
    start = time.process_time()
    assert check_regex(pattern)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("pattern", "fine"),
    [("[0-9]{1,3}", True), (r"\{a\}{3}", True), ("[{]{1,20}", True), ("x{2}{3}", True), ("(a|b)+[^]]*", True),
     (f"a{{{MAX_EXPANDED}}}", True), (f"a{{{MAX_EXPANDED + 1}}}", False), ("(?=a)b", False), ("[a", False),
     (r"a\1", False)],
)  # fmt: skip
def test_patterns(pattern: str, fine: bool) -> None:
    """Rust's syntax is taken, braces in classes and escapes are no repetition, and the cap is exact."""
    assert (check_regex(pattern) == "") == fine


def test_full_match() -> None:
    """A match is of the whole text, in UTF-8, whatever the text holds."""
    assert full_match("a+b", "aaab")
    assert not full_match("a+b", "aaabc")
    assert not full_match("a+b", "aaa")
    assert full_match("", "")
    assert not full_match("", "a")
    assert full_match("é+", "éé")
    assert full_match(".", "\U0001f600")
    assert not full_match("a", "\ud800")
    assert full_match("[0-9]+", "7" * 100_000)
    with pytest.raises(ValueError, match="unclosed group"):
        full_match("(a", "a")


def test_matches_are_bounded() -> None:
    """Patterns that make Python's `re` explode, or the automaton grow, end soon: with an answer or by a limit."""
    start = time.process_time()
    assert not full_match("(x+x+)+y", "x" * 20_000)
    assert not full_match("(a|aa)+b", "a" * 20_000)
    with pytest.raises(PatternTooComplex):
        full_match("(a{1,100}){1,100}", "a" * 10_000)
    assert time.process_time() - start < 5


def test_schemas() -> None:
    """A schema is a JSON object that the mask engine knows; depth and size are bounded."""
    assert check_schema('{"type": "object", "properties": {"a": {"type": "integer"}}}') == ""
    assert check_schema("{}") == ""
    for bad in ("", "[]", "3", '{"type":', '{"type": "wat"}', '{"type": "object", "patternProperties": 3}'):
        assert check_schema(bad), bad
    assert check_schema('{"not": ' * 300 + "{}" + "}" * 300)
    assert check_schema("[" * 100_000)
    assert check_schema('{"a": "' + "x" * 200_000 + '"}')


def test_a_plain_check_loads_neither_torch_nor_llguidance() -> None:
    """Checking a plan without patterns imports neither, which keeps the command quick."""
    program = (
        "import sys\n"
        "from anabranch.dsl.parse import parse_text\n"
        "from anabranch.dsl.check import check\n"
        "check(parse_text('p = plan(q) { gen(q, max=3, type=int); }'))\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'llguidance', 'numpy')))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(anabranch.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], check=False, env=env).returncode == 0
