"""The abstract syntax of a plan file.

    program = PlanDef+
    plan    = PlanDef(name, Param*, Option*, Block)
    block   = Block(stmt*)
    stmt    = Write(role, value)                      text user system assistant
            | Gen(name?, prompt?, Option*)
            | Fork(name?, index?, width, Option*, Block, Join?)
            | Branches(name?, Option*, Branch+, Join?)   a fork of named branches
            | Map(name?, index?, item, over, Option*, Block, Join?)
            | Reduce(name?, item, over, Option*, Block)
            | Loop(count, Block, until?)
            | If(cond, Block, Block?)
            | Need(cond)
            | Return(value)
            | Let(name, value)                        x = a + b;  x = host(y);
            | Call(name?, plan, Arg*, Option*)        x = solve(q);
            | Expand(name?, prompt?, Option*)
    branch  = Branch(label?, prompt?, Option*, Block)
    join    = Join(value, context)
    expr    = Name | Int | Float | Bool | Str | List | Unary | Binary | Field | Index | Apply

Spans take no part in equality, so `parse(print(p)) == p` compares meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from anabranch.dsl.diagnostics import NOWHERE, Source, Span


def _span() -> Span:
    return field(default=NOWHERE, compare=False, repr=False)


# --- expressions


@dataclass(frozen=True, slots=True)
class Name:
    id: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Int:
    value: int
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Float:
    value: float
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Bool:
    value: bool
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Str:
    """A string: literal text and interpolations in order. Adjacent literal parts are merged and none is empty.

    `"a #{x.y} b"` is `Str(("a ", Field(Name("x"), "y"), " b"))`; `##{` stands for a literal `#{`.
    """

    parts: tuple[str | Name | Field | Index, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class List:
    items: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Unary:
    op: Literal["!", "-"]
    operand: Expr
    span: Span = _span()


BinaryOp: TypeAlias = Literal["+", "-", "*", "/", "==", "!=", "<", "<=", ">", ">=", "&&", "||"]


@dataclass(frozen=True, slots=True)
class Binary:
    op: BinaryOp
    left: Expr
    right: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Field:
    value: Expr
    name: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Index:
    value: Expr
    index: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument of a call; `name` is set for `name=value`."""

    name: str | None
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Apply:
    """A call inside an expression: `len`, `lines`, `in`, `matches`, a type (`choice("a")`), or a host function."""

    function: str
    args: tuple[Arg, ...]
    span: Span = _span()


Expr: TypeAlias = Name | Int | Float | Bool | Str | List | Unary | Binary | Field | Index | Apply


# --- parts of statements


@dataclass(frozen=True, slots=True)
class Option:
    """`name=value` of a statement, a branch or a plan. `span` covers `name=value`."""

    name: str
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class JoinValue:
    """Which value comes out of a join.

    kind: all | vote | best | first | quorum
    count: n of `first(n)`, `quorum(n, _)` and `all(min=n)`; None elsewhere
    key: x of `vote(x)`, `best(x)`, `quorum(n, x)`; `best(logprob)` has key "logprob"
    by: exact | casefold | number; None when not written (then exact is used)
    """

    kind: Literal["all", "vote", "best", "first", "quorum"]
    count: Expr | None = None
    key: str | None = None
    by: Literal["exact", "casefold", "number"] | None = None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class JoinContext:
    """What the parent's context becomes. `positions` matters to `stitch` alone: max or sum."""

    kind: Literal["drop", "text", "stitch"]
    positions: Literal["max", "sum"] = "max"
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Join:
    """`join(value, context)`. A part not written is None: then `all`, and `drop`."""

    value: JoinValue | None = None
    context: JoinContext | None = None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Block:
    stmts: tuple[Stmt, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Branch:
    label: str | None
    prompt: Expr | None
    options: tuple[Option, ...]
    body: Block
    span: Span = _span()


# --- statements


@dataclass(frozen=True, slots=True)
class Write:
    role: Literal["text", "user", "system", "assistant"]
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Gen:
    name: str | None
    prompt: Expr | None
    options: tuple[Option, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Fork:
    """`fork(4) {...}` and `fork(i: 4) {...}`: `width` equal branches; `index` is bound in each, from 0."""

    name: str | None
    index: str | None
    width: Expr
    options: tuple[Option, ...]
    body: Block
    join: Join | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Branches:
    """`fork() { a = branch(...) {...}; ... }`: a fork whose branches are written out."""

    name: str | None
    options: tuple[Option, ...]
    branches: tuple[Branch, ...]
    join: Join | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Map:
    name: str | None
    index: str | None
    item: str
    over: Expr
    options: tuple[Option, ...]
    body: Block
    join: Join | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Reduce:
    """`reduce(item: over, by=3) {...}`; `by` is among the options."""

    name: str | None
    item: str
    over: Expr
    options: tuple[Option, ...]
    body: Block
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Loop:
    count: Expr
    body: Block
    until: Expr | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class If:
    cond: Expr
    then: Block
    orelse: Block | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Need:
    cond: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Return:
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Let:
    name: str
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Call:
    """`x = solve(q);` where `solve` is a plan of the same file (itself included, if it permits a depth)."""

    name: str | None
    plan: str
    args: tuple[Arg, ...]
    options: tuple[Option, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Expand:
    name: str | None
    prompt: Expr | None
    options: tuple[Option, ...]
    span: Span = _span()


Stmt: TypeAlias = Write | Gen | Fork | Branches | Map | Reduce | Loop | If | Need | Return | Let | Call | Expand


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter; `bound` is what stands after the colon, such as `text(2000)`, `list(16)` or `int`."""

    name: str
    bound: Expr | None = None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class PlanDef:
    name: str
    params: tuple[Param, ...]
    options: tuple[Option, ...]
    body: Block
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Program:
    plans: tuple[PlanDef, ...]
    source: Source = field(compare=False, repr=False, default_factory=lambda: Source("<plan>", ""))

    def plan(self, name: str | None = None) -> PlanDef:
        """The plan called `name`; the last of the file when None. Raises KeyError."""
        if name is None:
            return self.plans[-1]
        for plan in self.plans:
            if plan.name == name:
                return plan
        raise KeyError(name)


def names_in(expr: Expr) -> set[str]:
    """The names that `expr` reads, functions not counted."""
    found: set[str] = set()
    waiting: list[Expr] = [expr]
    while waiting:
        match waiting.pop():
            case Name(id=name):
                found.add(name)
            case Str(parts=pieces):
                waiting.extend(piece for piece in pieces if not isinstance(piece, str))
            case List(items=items):
                waiting.extend(items)
            case Unary(operand=operand):
                waiting.append(operand)
            case Binary(left=left, right=right):
                waiting += [left, right]
            case Field(value=value):
                waiting.append(value)
            case Index(value=value, index=index):
                waiting += [value, index]
            case Apply(args=args):
                waiting.extend(arg.value for arg in args)
            case Int() | Float() | Bool():
                pass
    return found
