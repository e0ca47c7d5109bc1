"""How long the lists of a plan can be.

    shape = ListOf(most, shape?) | RecordOf(field: shape?) | None        None: no list, or one of unknown length

A `map` or `reduce` over a list whose shape says `most` needs no `upto`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from anabranch.dsl import ast
from anabranch.dsl.spec import GenType, JoinSpec, LinesType


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of at most `most` items."""

    most: int
    item: Shape = None


@dataclass(frozen=True, slots=True)
class RecordOf:
    """A record, as `all` of labelled branches yields."""

    fields: Mapping[str, Shape]


Shape: TypeAlias = ListOf | RecordOf | None


def union(shapes: Iterable[Shape]) -> Shape:
    """What holds of a value that has one of `shapes`."""
    found: Shape = None
    for place, shape in enumerate(shapes):
        found = shape if place == 0 else _either(found, shape)
    return found


def _either(a: Shape, b: Shape) -> Shape:
    match a, b:
        case ListOf(), ListOf():
            return ListOf(max(a.most, b.most), _either(a.item, b.item))
        case RecordOf(), RecordOf():
            return RecordOf(
                {name: _either(shape, b.fields[name]) for name, shape in a.fields.items() if name in b.fields}
            )
        case _:
            return None


def of_gen(gen_type: GenType) -> Shape:
    """The shape of what a `gen` of this type yields."""
    return ListOf(gen_type.most) if isinstance(gen_type, LinesType) else None


def of_param(bound: ast.Expr | None) -> Shape:
    """The shape that a parameter states: `list(16)`, `list(16, text(200))`."""
    match bound:
        case ast.Apply(function="list", args=args) if args and isinstance(args[0].value, ast.Int):
            return ListOf(args[0].value.value, of_param(args[1].value) if len(args) > 1 else None)
        case _:
            return None


def of_expr(expr: ast.Expr, names: Mapping[str, Shape]) -> Shape:
    """The shape of `expr`, given those of the names that it reads."""
    match expr:
        case ast.Name(id=name):
            return names.get(name)
        case ast.List(items=items):
            return ListOf(len(items), union(of_expr(item, names) for item in items))
        case ast.Field(value=value, name=name):
            record = of_expr(value, names)
            return record.fields.get(name) if isinstance(record, RecordOf) else None
        case ast.Index(value=value):
            items_of = of_expr(value, names)
            return items_of.item if isinstance(items_of, ListOf) else None
        case _:
            return None


def of_join(join: JoinSpec, returned: Mapping[str | None, Shape], key: Shape, width: int) -> Shape:
    """The shape of what a join yields.

    returned: the shape of what the branches return, by label; unlabelled ones under None
    key: the shape of the key that the join reads, in any branch
    width: how many branches there are at most
    """
    match join.kind:
        case "all" if None not in returned:
            return RecordOf({label: shape for label, shape in returned.items() if label is not None})
        case "all":
            return ListOf(width, union(returned.values()))
        case "first" if join.count is not None and join.count > 1:
            return ListOf(min(join.count, width), union(returned.values()))
        case "first" | "best":
            return union(returned.values())
        case "vote" | "quorum":
            return key


def most_items(shape: Shape, upto: int | None) -> int | None:
    """The most items of a list of this shape under `upto`; None where neither bounds it."""
    most = shape.most if isinstance(shape, ListOf) else None
    if upto is None or most is None:
        return upto if most is None else most
    return min(upto, most)
