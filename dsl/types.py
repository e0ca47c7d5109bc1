"""Types of the language's values, as the checker infers them.

    type = Text(free) | Int | Float | Bool | ListOf(elem, most) | Record(fields) | AnyType

`AnyType` is a value that only the run knows: what a host function or a `json` gen yields, and a parameter without
a bound. It goes with everything; what it turns out to be is checked when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from anabranch.dsl.ast import Apply, Arg, Expr, Name
from anabranch.dsl.diagnostics import Diagnostic, PlanError, did_you_mean
from anabranch.dsl.options import MAX_TOKENS, MAX_WIDTH, bounded_int
from anabranch.dsl.spec import (
    BoolType,
    ChoiceType,
    FloatType,
    GenType,
    IntType,
    JsonType,
    LinesType,
    RegexType,
    TextType,
)


@dataclass(frozen=True, slots=True)
class Text:
    """`free`: what a person or a model wrote without a form, so that two of one meaning seldom are equal."""

    free: bool = field(default=True, compare=False)


@dataclass(frozen=True, slots=True)
class Int:
    pass


@dataclass(frozen=True, slots=True)
class Float:
    pass


@dataclass(frozen=True, slots=True)
class Bool:
    pass


@dataclass(frozen=True, slots=True)
class ListOf:
    """`most`: the most items there can be; None where only the run knows."""

    elem: Type
    most: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Record:
    """Named values, in the order of the branches that gave them."""

    fields: tuple[tuple[str, Type], ...]

    def get(self, name: str) -> Type | None:
        """The type of field `name`; None where there is no such field."""
        return next((t for n, t in self.fields if n == name), None)


@dataclass(frozen=True, slots=True)
class AnyType:
    pass


Type: TypeAlias = Text | Int | Float | Bool | ListOf | Record | AnyType

TEXT: Type = Text()
INT: Type = Int()
FLOAT: Type = Float()
BOOL: Type = Bool()
ANY: Type = AnyType()

_BOUNDS = ("text", "int", "float", "bool", "list")


def show(t: Type) -> str:
    """The type as an error names it."""
    match t:
        case Text():
            return "text"
        case Int():
            return "int"
        case Float():
            return "float"
        case Bool():
            return "bool"
        case ListOf(elem=AnyType()):
            return "a list"
        case ListOf(elem=elem):
            return f"a list of {show(elem)}"
        case Record(fields=fields):
            return f"a record of {', '.join(f'`{name}`' for name, _ in fields)}"
        case AnyType():
            return "any value"
        case _:
            assert_never(t)


def of_gen(gen_type: GenType) -> Type:
    """The type of the value that a `gen` of `gen_type` yields."""
    match gen_type:
        case TextType():
            return TEXT
        case IntType():
            return INT
        case FloatType():
            return FLOAT
        case BoolType():
            return BOOL
        case LinesType(most=most):
            return ListOf(TEXT, most)
        case ChoiceType() | RegexType():
            return Text(free=False)
        case JsonType():
            return ANY
        case _:
            assert_never(gen_type)


def of_bound(bound: Expr | None) -> Type:
    """The type that a parameter's bound states.

    `text`, `text(most tokens)`, `int`, `float`, `bool`, `list`, `list(most items)`, `list(most items, bound)`; a
    parameter without a bound takes any value. Raises PlanError: bad-bound, not-constant, option-type, option-range.
    """
    args: tuple[Arg, ...] = ()
    match bound:
        case None:
            return ANY
        case Name(id=name):
            pass
        case Apply(function=name, args=args):
            pass
        case _:
            raise PlanError(_bad_bound("this is no bound of a parameter", bound))
    if name not in _BOUNDS:
        raise PlanError(_bad_bound(f"there is no bound `{name}`", bound, did_you_mean(name, _BOUNDS)))
    most = {"text": 1, "list": 2}.get(name, 0)
    if len(args) > most or any(arg.name is not None for arg in args):
        raise PlanError(
            _bad_bound(f"the bound `{name}` takes {most or 'no'} argument{'s' if most != 1 else ''}", bound)
        )
    if name == "text":
        if args:
            bounded_int(args[0].value, 1, MAX_TOKENS, "the bound of a text")
        return TEXT
    if name == "list":
        items = bounded_int(args[0].value, 0, MAX_WIDTH, "the bound of a list") if args else None
        return ListOf(of_bound(args[1].value) if len(args) > 1 else ANY, items)
    plain: dict[str, Type] = {"int": INT, "float": FLOAT, "bool": BOOL}
    return plain[name]


def is_number(t: Type) -> bool:
    """Whether a value of the type may be a number."""
    return isinstance(t, Int | Float | AnyType)


def fits(t: Type, into: Type) -> bool:
    """Whether a value of type `t` may stand where one of type `into` is wanted. An int fits into a float."""
    if isinstance(t, AnyType) or isinstance(into, AnyType):
        return True
    if isinstance(t, Int) and isinstance(into, Float):
        return True
    if isinstance(t, ListOf) and isinstance(into, ListOf):
        return fits(t.elem, into.elem)
    if isinstance(t, Record) and isinstance(into, Record):
        wanted = dict(into.fields)
        return dict(t.fields).keys() == wanted.keys() and all(fits(f, wanted[name]) for name, f in t.fields)
    return t == into


def comparable(a: Type, b: Type) -> bool:
    """Whether `==` may hold between values of the types: one type, or int and float."""
    return fits(a, b) or fits(b, a)


def merge(a: Type, b: Type) -> Type:
    """The least type that holds the values of both, or any value where none does."""
    match a, b:
        case (Text(free=x), Text(free=y)):
            return Text(free=x or y)
        case (ListOf(elem=x, most=m), ListOf(elem=y, most=n)):
            return ListOf(merge(x, y), None if m is None or n is None else max(m, n))
        case (Int() | Float(), Int() | Float()):
            return a if a == b else FLOAT
        case (Record(fields=x), Record(fields=y)) if [n for n, _ in x] == [n for n, _ in y]:
            return Record(tuple((n, merge(s, t)) for (n, s), (_, t) in zip(x, y, strict=True)))
        case _:
            return a if a == b else ANY


def _bad_bound(message: str, bound: Expr, near: str = "") -> Diagnostic:
    return Diagnostic(
        "bad-bound",
        message,
        bound.span,
        help=near or "write `text(2000)`, `list(16)`, `list(16, text(200))`, `int`, `float` or `bool`",
    )
