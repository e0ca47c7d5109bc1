"""What the passes need to know about expressions: the names they read, and what constant ones are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, assert_never

from anabranch.dsl import ast


def names_read(expr: ast.Expr) -> Iterator[str]:
    """Every name that `expr` reads, as often as it does, from left to right."""
    stack = [expr]
    while stack:
        current = stack.pop()
        if isinstance(current, ast.Name):
            yield current.id
        else:
            stack.extend(reversed(children(current)))


def children(expr: ast.Expr) -> tuple[ast.Expr, ...]:
    """The expressions directly inside `expr`, from left to right."""
    match expr:
        case ast.Name() | ast.Int() | ast.Float() | ast.Bool():
            return ()
        case ast.Str(parts=parts):
            return tuple(part for part in parts if not isinstance(part, str))
        case ast.List(items=items):
            return items
        case ast.Unary(operand=operand):
            return (operand,)
        case ast.Binary(left=left, right=right):
            return (left, right)
        case ast.Field(value=value):
            return (value,)
        case ast.Index(value=value, index=index):
            return (value, index)
        case ast.Apply(args=args):
            return tuple(arg.value for arg in args)
        case _:
            assert_never(expr)


def render(value: Any) -> str:
    """A value of the language as the text that an interpolation of it writes."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() | int():
            return repr(value)
        case list() | tuple():
            return "\n".join(render(item) for item in value)
        case Mapping():
            return "\n".join(f"{name}: {render(item)}" for name, item in value.items())
        case _:
            return str(value)
