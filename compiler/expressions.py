"""What the passes need to know about expressions: the names they read, and what constant ones are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, assert_never

from anabranch.compiler.graph import Region
from anabranch.dsl import ast


def calls_in(part: object) -> list[ast.Apply]:
    """The calls in the expressions of a node, a plan or a program, in no order; those in a node's regions left out."""
    found: list[ast.Apply] = []
    waiting: list[Any] = [part]
    while waiting:
        record = waiting.pop()
        if isinstance(record, ast.Apply):
            found.append(record)
        if isinstance(record, Mapping):
            waiting.extend(record.values())
        elif isinstance(record, tuple | list):
            waiting.extend(record)
        elif is_dataclass(record) and not isinstance(record, Region):
            waiting.extend(getattr(record, one.name) for one in fields(record))
    return found


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
