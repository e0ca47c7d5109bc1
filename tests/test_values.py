"""Expressions at run time: what they give, and that nothing a model writes makes them long or large."""

from __future__ import annotations

import time
from typing import Any

import pytest

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Span
from anabranch.dsl.parse import parse_text
from anabranch.dsl.values import (
    MAX_DIGITS,
    MAX_NESTING,
    MAX_NODES,
    MAX_TEXT,
    EvaluationError,
    checked,
    equal,
    evaluate,
    parts,
    render,
    vote_key,
)

ENV: dict[str, Any] = {
    "n": 3,
    "f": 1.5,
    "t": "a, b",
    "xs": [1, 2, 3],
    "r": {"x": "in", "ys": ["p", "q"]},
    "yes": True,
    "nothing": None,
}


def expr(text: str) -> ast.Expr:
    stmt = parse_text(f"p = plan() {{ z = {text}; }}").plans[0].body.stmts[0]
    assert isinstance(stmt, ast.Let)
    return stmt.value


def host(name: str, args: list[Any]) -> Any:
    if name == "double":
        return args[0] * 2
    if name == "give":
        return {"tuple": (1, 2), "nan": float("nan"), "set": {1}, "keys": {1: 2}}[args[0]]
    raise LookupError(f"no {name}")


def value(text: str, **more: Any) -> Any:
    return evaluate(expr(text), {**ENV, **more}, host)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1 + 2 * 3 - 4", 3), ("7 / 2", 3.5), ("6 / 2", 3.0), ("-n", -3), ("1 + f", 2.5), ('"a" + t', "aa, b"),
        ("n == 3.0", True), ('t == "a, b"', True), ('n == "3"', False), ("yes == 1", False), ("yes != 1", True),
        ("[1, [2.0]] == [1.0, [2]]", True), ("n <= 3 && f > 1", True), ('"a" < "b"', True), ("!yes || n > 2", True),
        ("r.x", "in"), ("r.ys[1]", "q"), ("xs[n - 1]", 3), ("len(xs)", 3), ("len(t)", 4), ("in(2, xs)", True),
        ("in(true, xs)", False), ('in("a", t)', True), ("in(nothing, xs)", False), ("double(n)", 6),
        ('lines("  a ")', ["a"]), ('matches("ab", "a.")', True), ('matches("abc", "a.")', False),
        ('"n is #{n}, f is #{f}, #{yes}, #{nothing}: #{r.ys}"', "n is 3, f is 1.5, true, null: p\nq"),
        ('give("tuple")', [1, 2]), ("[n, f]", [3, 1.5]),
    ],
)  # fmt: skip
def test_values(text: str, wanted: Any) -> None:
    """Each operator and function gives what the language says."""
    got = value(text)
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", "division by zero"), ("1 / (f - 1.5)", "division by zero"), ("xs[3]", "no item 3"),
        ("xs[-1]", "no item -1"), ("xs[f]", "an index is an int"), ("xs[yes]", "an index is an int"),
        ("r.z", "no field `z`"), ("n.z", "has no field"), ("t[0]", "only a list"), ('1 + "a"', "two numbers or two"),
        ("yes + 1", "two numbers"), ("-t", "not a number"), ("!n", "not a bool"), ("n && yes", "not a bool"),
        ("yes && n", "not a bool"), ("xs < xs", "orders two"), ("yes < 2", "orders two"), ("nope", "not bound"),
        ("len(n)", "cannot take an int"), ("in(1, 2)", "cannot take"), ('matches("a", "(")', "unclosed group"),
        ('give("nan")', "nan"), ('give("set")', "a set"), ('give("keys")', "whose name is an int"),
        ('give("other")', "`give` raised KeyError"), ("missing(1)", "raised LookupError: no missing"),
        ("1000000000000.0 / 0.000000000000001 * f * big", "too large for a float"), ("huge / 2", "too large"),
        ("huge * huge", "digits"), ("huge + huge", "digits"),
    ],
)  # fmt: skip
def test_failures(text: str, reason: str) -> None:
    """What has no value fails with a reason, and says where."""
    with pytest.raises(EvaluationError, match=reason) as caught:
        value(text, huge=10**MAX_DIGITS - 1, big=1e300)
    assert caught.value.span is not None


def test_logic_is_short_circuit() -> None:
    """The right operand is evaluated only where the left does not decide."""
    assert value("!yes && 1 / 0 == 1") is False
    assert value("yes || 1 / 0 == 1") is True
    assert value("!yes && yes || yes") is True
    with pytest.raises(EvaluationError):
        value("yes && 1 / 0 == 1")


def test_host_failures_keep_their_reason() -> None:
    """A function that already speaks of a failure is quoted, at the place of the call."""

    def call(name: str, args: list[Any]) -> Any:
        raise EvaluationError("the search is down")

    with pytest.raises(EvaluationError, match=r"^the search is down$") as caught:
        evaluate(ast.Apply("search", (), Span(3, 9)), {}, call)
    assert caught.value.span == Span(3, 9)


def test_long_spines_do_not_overflow() -> None:
    """A sum of 20,000 terms and a path of 20,000 fields are walked."""
    total: ast.Expr = ast.Int(1)
    path: ast.Expr = ast.Name("r")
    for _ in range(20_000):
        total = ast.Binary("+", total, ast.Int(1))
        path = ast.Index(path, ast.Int(0))
    assert evaluate(total, {}, host) == 20_001
    loop: list[Any] = []
    loop.append(loop)
    assert evaluate(path, {"r": loop}, host) is loop


def test_text_and_lists_do_not_grow_without_end() -> None:
    """Doubling a text, a list or a nest comes to a limit, long before memory does."""
    doubles = {"a + a": "x", "[a, a]": [1], "[a]": [], '"#{a}#{a}"': "x"}
    start = time.process_time()
    for text, begin in doubles.items():
        grow, a = expr(text), begin
        with pytest.raises(EvaluationError, match=r"longer|more than|deeper"):
            for _ in range(1000):
                a = evaluate(grow, {"a": a}, host)
    assert time.process_time() - start < 5


def test_render() -> None:
    """Values are written as the language says, and a shared list does not make the text explode."""
    assert [render(v) for v in ("a\nb", 3, 0.1, True, False, None, [], {})] == [
        "a\nb", "3", "0.1", "true", "false", "null", "", "",
    ]  # fmt: skip
    assert render(["a", [1, 2], True]) == "a\n1\n2\ntrue"
    assert render({"x": 1, "y": "b"}) == "x: 1\ny: b"
    shared: Any = "abc"
    for _ in range(MAX_NESTING):
        shared = [shared, shared]
    with pytest.raises(EvaluationError, match="longer"):
        render(shared)
    with pytest.raises(EvaluationError, match="deeper"):
        render([shared])


def test_parts_mark_literals() -> None:
    """Only what stands in the plan's text is literal: a special token in a value is not."""
    env = {"x": "<|im_end|>", "empty": "", "xs": ["a", "b"]}
    assert parts(expr('"<s> #{x} #{empty} #{xs}"'), env) == (
        ("<s> ", True),
        ("<|im_end|>", False),
        ("  ", True),
        ("a\nb", False),
    )
    assert parts(expr("x"), env) == (("<|im_end|>", False),)
    assert parts(expr('"a" + x'), env) == (("a<|im_end|>", False),)
    assert parts(expr('""'), env) == ()
    assert parts(expr('"#{empty}"'), env) == ()
    assert parts(expr("double(n)"), {"n": 2}, host) == (("4", False),)
    with pytest.raises(EvaluationError, match="longer"):
        parts(expr('"#{x}#{x}"'), {"x": "a" * (MAX_TEXT // 2 + 1)})


def test_checked_values() -> None:
    """What a host function may return: the language's values, tuples as lists, nothing else."""
    assert checked((1, [2.5, {"a": None}])) == [1, [2.5, {"a": None}]]
    for bad in (float("inf"), {1: 2}, object(), b"bytes", "x" * (MAX_TEXT + 1), 10**MAX_DIGITS, [0] * MAX_NODES):
        with pytest.raises(EvaluationError):
            checked(bad)
    deep: Any = 0
    for _ in range(MAX_NESTING + 1):
        deep = [deep]
    with pytest.raises(EvaluationError, match="deeper"):
        checked(deep)


def test_equal_is_strict_about_kinds() -> None:
    """Int and float compare by number; bool, text and null equal their own kind alone."""
    assert equal({"a": [1]}, {"a": [1.0]})
    assert not equal({"a": 1}, {"b": 1})
    assert not equal([1], [1, 2])
    assert not equal(True, 1)
    assert not equal(None, 0)
    assert equal(None, None)
    assert not equal(2**53 + 1, float(2**53))


def test_votes() -> None:
    """Votes are one where the rule says so, and what is no number casts none under `number`."""
    assert vote_key("Yes", "exact") != vote_key("yes", "exact")
    assert vote_key(" Yes\n", "casefold") == vote_key("yes", "casefold")
    assert vote_key("STRASSE", "casefold") == vote_key("straße", "casefold")
    assert vote_key(3, "exact") == vote_key(3.0, "exact")
    assert vote_key(True, "exact") != vote_key(1, "exact")
    assert vote_key([1, "a"], "exact") == vote_key([1.0, "a"], "exact")
    assert vote_key({"a": 1, "b": 2}, "exact") == vote_key({"b": 2, "a": 1}, "exact")
    assert vote_key("3", "exact") != vote_key(3, "exact")
    same = {vote_key(v, "number") for v in (42, 42.0, "42", " 42.0 ", "+42", "4.2e1", "42.")}
    assert len(same) == 1 and None not in same
    assert vote_key("1,234", "number") == vote_key(1234, "number")
    for none in ("forty", "", "4 2", "1,23", True, None, [42], "1e99999", "0x10", "٤٢", "1" * 5000):
        assert vote_key(none, "number") is None


def test_votes_take_no_time() -> None:
    """A long text that is nearly a number is refused in linear time."""
    start = time.process_time()
    assert vote_key("1," * 400_000 + "x", "number") is None
    assert vote_key("1" * 900_000 + "x", "number") is None
    assert vote_key("111," * 200_000, "number") is None
    assert time.process_time() - start < 2
