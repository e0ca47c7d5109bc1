"""Strategies for programs that are well formed as syntax: every statement, and names that mean nothing.

What the checker wants (scopes, types, bounds) is not looked at here.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from anabranch.dsl import ast
from anabranch.dsl.shapes import EXAMPLES
from anabranch.dsl.strings import write_string

_WORDS = ["a", "b2", "x_y", "ans", "work", "group", "in", "int", "join", "else", "until", "lines", "logprob"]
_PLANS = ["plan_a", "plan_b", "plan_c"]

names = st.sampled_from(_WORDS) | st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: name not in EXAMPLES and name not in ("plan", "true", "false", *_PLANS)
)
"""Names that can stand anywhere; also the words that are keywords in one place alone."""

_literals = st.text(
    st.sampled_from("#{}\"'\n \\`ab0é→") | st.characters(exclude_categories=("Cs",), exclude_characters="\r"),
    min_size=1,
    max_size=12,
)

chains: st.SearchStrategy[Any] = st.recursive(
    names.map(ast.Name),
    lambda inner: st.builds(ast.Field, inner, names) | st.builds(ast.Index, inner, st.integers(-9, 99).map(ast.Int)),
    max_leaves=4,
)
"""What may be interpolated."""


def _can_be_written(string: ast.Str) -> bool:
    try:
        write_string(string)
    except ValueError:
        return False
    return True


def _merged(parts: list[Any]) -> ast.Str:
    out: list[Any] = []
    for part in parts:
        if out and isinstance(part, str) and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return ast.Str(tuple(out))


strings = st.lists(_literals | chains, max_size=4).map(_merged).filter(_can_be_written)

_leaves: st.SearchStrategy[Any] = st.one_of(
    names.map(ast.Name),
    st.integers().map(ast.Int),
    st.floats(allow_nan=False, allow_infinity=False).map(ast.Float),
    st.booleans().map(ast.Bool),
    strings,
)


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    operators = st.sampled_from(["+", "-", "*", "/", "==", "!=", "<", "<=", ">", ">=", "&&", "||"])
    args = st.builds(ast.Arg, st.none() | names, inner)
    return st.one_of(
        st.lists(inner, max_size=3).map(lambda items: ast.List(tuple(items))),
        st.builds(ast.Unary, st.sampled_from(["!", "-"]), inner),
        st.builds(ast.Binary, operators, inner, inner),
        st.builds(ast.Field, inner, names),
        st.builds(ast.Index, inner, inner),
        st.builds(ast.Apply, names, st.lists(args, max_size=3).map(tuple)),
    )


exprs = st.recursive(_leaves, _compound, max_leaves=6)


def options(max_size: int = 3) -> st.SearchStrategy[Any]:
    """Options of one statement, none twice."""
    return st.dictionaries(names, exprs, max_size=max_size).map(
        lambda given: tuple(ast.Option(name, value) for name, value in given.items())
    )


_by = st.none() | st.sampled_from(["exact", "casefold", "number"])
join_values = st.one_of(
    st.builds(ast.JoinValue, st.just("all"), st.none() | exprs),
    st.builds(ast.JoinValue, st.just("vote"), st.none(), names, _by),
    st.builds(ast.JoinValue, st.just("best"), st.none(), names),
    st.builds(ast.JoinValue, st.just("first"), exprs),
    st.builds(ast.JoinValue, st.just("quorum"), exprs, names, _by),
)
join_contexts = st.builds(ast.JoinContext, st.sampled_from(["drop", "text", "stitch"])) | st.just(
    ast.JoinContext("stitch", "sum")
)
joins = st.builds(ast.Join, st.none() | join_values, st.none() | join_contexts)

_bound = st.none() | names


def _let(name: str, value: Any) -> Any:
    return ast.Let(name, value)


def statements(calls: st.SearchStrategy[Any], depth: int = 2) -> st.SearchStrategy[Any]:
    """Every kind of statement, with blocks at most `depth` deep; `calls` gives the calls of plans."""
    prompts = st.none() | exprs
    simple = st.one_of(
        st.builds(ast.Write, st.sampled_from(["text", "user", "system", "assistant"]), exprs),
        st.builds(ast.Gen, _bound, prompts, options()),
        st.builds(ast.Expand, _bound, prompts, options()),
        st.builds(ast.Need, exprs),
        st.builds(ast.Return, exprs),
        st.builds(_let, names, exprs),
        calls,
    )
    if depth == 0:
        return simple
    blocks = st.lists(st.deferred(lambda: statements(calls, depth - 1)), max_size=3).map(
        lambda stmts: ast.Block(tuple(stmts))
    )
    branches = st.builds(ast.Branch, _bound, prompts, options(1), blocks)
    joined = st.none() | joins
    return st.one_of(
        simple,
        st.builds(ast.Fork, _bound, _bound, exprs, options(2), blocks, joined),
        st.builds(ast.Branches, _bound, options(2), st.lists(branches, min_size=1, max_size=3).map(tuple), joined),
        st.builds(ast.Map, _bound, _bound, names, exprs, options(2), blocks, joined),
        st.builds(ast.Reduce, _bound, names, exprs, options(2), blocks),
        st.builds(ast.Loop, exprs, blocks, st.none() | exprs),
        st.builds(ast.If, exprs, blocks, st.none() | blocks),
    )


@st.composite
def programs(draw: st.DrawFn, depth: int = 2) -> ast.Program:
    """One to three plans that may call one another."""
    signatures = {
        name: draw(st.lists(names, max_size=2, unique=True))
        for name in draw(st.lists(st.sampled_from(_PLANS), min_size=1, max_size=3, unique=True))
    }

    @st.composite
    def calls(draw: st.DrawFn) -> ast.Call:
        plan = draw(st.sampled_from(sorted(signatures)))
        params = signatures[plan]
        named = st.sampled_from(params) if params else st.nothing()
        args = draw(st.lists(st.builds(ast.Arg, st.none() | named, exprs), max_size=2))
        given = tuple(option for option in draw(options(2)) if option.name not in params)
        return ast.Call(draw(_bound), plan, tuple(args), given)

    plans = []
    for name, params in signatures.items():
        body = draw(st.lists(statements(calls(), depth), max_size=4))
        bounds = [ast.Param(param, draw(st.none() | exprs)) for param in params]
        plans.append(ast.PlanDef(name, tuple(bounds), draw(options(2)), ast.Block(tuple(body))))
    return ast.Program(tuple(plans))
