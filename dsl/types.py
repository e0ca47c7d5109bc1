"""Types of the language's values, as the checker infers them.

    type = Text(free, most) | Int | Float | Bool | ListOf(elem, most) | Record(fields) | AnyType

`AnyType` is a value that only the run knows: what a host function or a `json` gen yields, and a parameter without
a bound. It goes with everything; what it turns out to be is checked when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    Value,
)
from anabranch.dsl.values import MAX_NESTING, EvaluationError, checked

MAX_PARTS = 4096
"""The most parts of a type that is kept whole. Names make types of types, so a few lines can describe more values than
there are atoms; comparing two such types would never end."""


@dataclass(frozen=True, slots=True)
class _Size:
    """Of a type: its parts, as a tree, and how deep they nest."""

    parts: int
    nesting: int


@dataclass(frozen=True, slots=True)
class Text:
    """`free`: what a person or a model wrote without a form, so that two of one meaning seldom are equal.

    most: the most tokens that a parameter's bound permits; None where none is stated
    """

    free: bool = field(default=True, compare=False)
    most: int | None = field(default=None, compare=False)


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
    size: _Size = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size_of([self.elem]))


@dataclass(frozen=True, slots=True)
class Record:
    """Named values, in the order of the branches that gave them."""

    fields: tuple[tuple[str, Type], ...]
    size: _Size = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size_of([t for _, t in self.fields]))

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

_PLAIN = _Size(1, 0)


def _size_of(inner: Sequence[Type]) -> _Size:
    """The size of a type with these parts in it."""
    sizes = [t.size if isinstance(t, ListOf | Record) else _PLAIN for t in inner]
    return _Size(1 + sum(s.parts for s in sizes), 1 + max((s.nesting for s in sizes), default=0))


def bounded(t: Type) -> Type:
    """`t`, or less is known of it where it has more than `MAX_PARTS` parts or nests deeper than any value may."""
    if not isinstance(t, ListOf | Record) or (t.size.parts <= MAX_PARTS and t.size.nesting <= MAX_NESTING):
        return t
    return ListOf(ANY, t.most) if isinstance(t, ListOf) else ANY


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
        return Text(most=bounded_int(args[0].value, 1, MAX_TOKENS, "the bound of a text")) if args else TEXT
    if name == "list":
        items = bounded_int(args[0].value, 0, MAX_WIDTH, "the bound of a list") if args else None
        return ListOf(of_bound(args[1].value) if len(args) > 1 else ANY, items)
    plain: dict[str, Type] = {"int": INT, "float": FLOAT, "bool": BOOL}
    return plain[name]


def input_mismatch(value: object, t: Type) -> str:
    """Why a caller may not pass `value` for a parameter of type `t`; "" where it may.

    A tuple is refused, though a host function may return one: an input is used as it was given.
    """
    try:
        checked(value, "it")
    except EvaluationError as error:
        return error.reason
    return _not_plain(value) or _mismatch(value, t)


def bounded_texts(value: Value, t: Type) -> Iterator[tuple[str, int]]:
    """The texts in a `value` of type `t` whose length is bounded, each with the most tokens it may take."""
    match t:
        case Text(most=int(most)):
            yield value, most
        case ListOf(elem=elem):
            for item in value:
                yield from bounded_texts(item, elem)


def is_number(t: Type) -> bool:
    """Whether a value of the type may be a number."""
    return isinstance(t, Int | Float | AnyType)


def fits(t: Type, into: Type) -> bool:
    """Whether a value of type `t` may stand where one of type `into` is wanted. An int fits into a float."""
    if t is into:
        return True
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
    if a is b:
        return a
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


def _not_plain(value: Value) -> str:
    """What in a value that `checked` accepts is no input all the same."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        match inner:
            case tuple():
                return "a tuple is no value of the language: pass a list"
            case list():
                waiting.extend(inner)
            case dict():
                waiting.extend(inner)
                waiting.extend(inner.values())
            case str() if not inner.isascii():
                try:
                    inner.encode()
                except UnicodeEncodeError:
                    return "a text in it can't be written as UTF-8"
    return ""


def _mismatch(value: Value, t: Type) -> str:
    """Why `value` is none of type `t`; "" when it is one."""
    match t:
        case AnyType():
            return ""
        case Text():
            is_one = isinstance(value, str)
        case Bool():
            is_one = isinstance(value, bool)
        case Int():
            is_one = isinstance(value, int) and not isinstance(value, bool)
        case Float():
            is_one = isinstance(value, int | float) and not isinstance(value, bool)
        case ListOf(elem=elem, most=most):
            is_one = isinstance(value, list)
            if is_one and most is not None and len(value) > most:
                return f"this has {len(value)} items"
            for item in value if is_one else ():
                if reason := _mismatch(item, elem):
                    return f"in one item {reason}"
        case Record():
            is_one = isinstance(value, dict)
        case _:
            assert_never(t)
    return "" if is_one else f"this is {_kind(value)}"


def _kind(value: Value) -> str:
    # Not the words of `values.kind`: whoever gives an input may never have read the language.
    match value:
        case str():
            return "text"
        case bool():
            return "true or false"
        case int():
            return "a whole number"
        case float():
            return "a number"
        case list():
            return "a list"
        case None:
            return "null"
        case _:
            return "an object"


def _bad_bound(message: str, bound: Expr, near: str = "") -> Diagnostic:
    return Diagnostic(
        "bad-bound",
        message,
        bound.span,
        help=near or "write `text(2000)`, `list(16)`, `list(16, text(200))`, `int`, `float` or `bool`",
    )
