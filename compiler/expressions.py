"""What the passes need to know about expressions: the names they read, and what constant ones are worth."""

from __future__ import annotations

from typing import assert_never

from anabranch.dsl import ast


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
