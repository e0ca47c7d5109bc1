"""Types of expressions, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from anabranch.dsl import types
from anabranch.dsl.ast import (
    Apply,
    Binary,
    Bool,
    Expr,
    Field,
    Float,
    Index,
    Int,
    List,
    Name,
    Str,
    Unary,
)
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Span, did_you_mean
from anabranch.dsl.options import const_int, is_constant, literal
from anabranch.dsl.patterns import check_regex
from anabranch.dsl.scope import Scope
from anabranch.dsl.types import ANY, BOOL, FLOAT, INT, TEXT, AnyType, ListOf, Record, Text, Type, show

BUILTINS = {"len": 1, "lines": 1, "in": 2, "matches": 2}
"""The functions of the language, with how many arguments they take."""

TYPE_WORDS = ("int", "float", "bool", "lines", "choice", "regex", "json")


class ExprChecker:
    """Infers types. What is wrong goes to `report`; the type is then `AnyType`, so that one mistake is told once."""

    def __init__(
        self,
        report: Callable[[Diagnostic], None],
        undefined: Callable[[str, Scope, Span], Diagnostic],
        plans: Collection[str],
        functions: Collection[str],
    ) -> None:
        self._report = report
        self._undefined = undefined
        self._plans = plans
        self._functions = functions

    def infer(self, expr: Expr, scope: Scope) -> Type:
        """The type of `expr`."""
        # Operators and `.x[0]` pile up to the left without brackets, so the left spine is walked, not recursed into.
        spine: list[Binary | Field | Index | Unary] = []
        node = expr
        while True:
            match node:
                case Binary(left=inner) | Field(value=inner) | Index(value=inner) | Unary(operand=inner):
                    spine.append(node)
                    node = inner
                case _:
                    break
        found = self._atom(node, scope)
        for outer in reversed(spine):
            match outer:
                case Binary(right=right):
                    found = self._binary(outer, found, self.infer(right, scope))
                case Field():
                    found = self._field(outer, found)
                case Index():
                    found = self._index(outer, found, self.infer(outer.index, scope))
                case Unary():
                    found = self._unary(outer, found)
        return found

    def want(self, expr: Expr, scope: Scope, wanted: Type, what: str) -> Type:
        """The type of `expr`, which must fit `wanted`; `what` names its place in the error."""
        found = self.infer(expr, scope)
        if not types.fits(found, wanted):
            self._error("wrong-operand", f"{what} is {show(wanted)}, not {show(found)}", expr.span)
        return found

    def _atom(self, expr: Expr, scope: Scope) -> Type:
        match expr:
            case Name(id=name):
                binding = scope.lookup(name)
                if binding is None:
                    self._report(self._undefined(name, scope, expr.span))
                    return ANY
                binding.use()
                return binding.type
            case Int():
                return INT
            case Float():
                return FLOAT
            case Bool():
                return BOOL
            case Str(parts=parts):
                for part in parts:
                    if not isinstance(part, str):
                        self.infer(part, scope)
                return Text(free=any(not isinstance(part, str) for part in parts))
            case List(items=items):
                elem: Type | None = None
                for item in items:
                    found = self.infer(item, scope)
                    elem = found if elem is None else types.merge(elem, found)
                return ListOf(ANY if elem is None else elem, len(items))
            case Apply():
                return self._apply(expr, scope)
            case _:
                raise TypeError(f"not an expression: {expr!r}")

    def _binary(self, expr: Binary, left: Type, right: Type) -> Type:
        op = expr.op
        if op in ("&&", "||"):
            for side, found in ((expr.left, left), (expr.right, right)):
                if not types.fits(found, BOOL):
                    self._error("wrong-operand", f"an operand of `{op}` is bool, not {show(found)}", side.span)
            return BOOL
        if op in ("==", "!="):
            if not types.comparable(left, right):
                self._error(
                    "compare-types",
                    f"`{op}` compares {show(left)} with {show(right)}, which are never equal",
                    expr.span,
                )
            return BOOL
        if op in ("<", "<=", ">", ">="):
            texts = isinstance(left, Text | AnyType) and isinstance(right, Text | AnyType)
            numbers = types.is_number(left) and types.is_number(right)
            if not (texts or numbers):
                self._error(
                    "compare-types" if type(left) is not type(right) else "wrong-operand",
                    f"`{op}` orders two numbers or two texts, not {show(left)} and {show(right)}",
                    expr.span,
                )
            return BOOL
        if op == "+" and (isinstance(left, Text) or isinstance(right, Text)):
            if not (types.fits(left, TEXT) and types.fits(right, TEXT)):
                other = right if isinstance(left, Text) else left
                self._error(
                    "wrong-operand",
                    f"`+` joins text with text, not with {show(other)}",
                    expr.span,
                    help='interpolate it: `"... #{x}"`',
                )
            return TEXT
        for side, found in ((expr.left, left), (expr.right, right)):
            if not types.is_number(found):
                wanted = "a number or a text" if op == "+" else "a number"
                self._error("wrong-operand", f"an operand of `{op}` is {wanted}, not {show(found)}", side.span)
                return ANY
        if op == "/":
            if is_constant(expr.right) and _is_zero(expr.right):
                self._error("division-by-zero", "this divides by zero", expr.span)
            return FLOAT
        if isinstance(left, AnyType) or isinstance(right, AnyType):
            return ANY
        return types.merge(left, right)

    def _unary(self, expr: Unary, found: Type) -> Type:
        if expr.op == "!":
            if not types.fits(found, BOOL):
                self._error("wrong-operand", f"the operand of `!` is bool, not {show(found)}", expr.span)
            return BOOL
        if not types.is_number(found):
            self._error("wrong-operand", f"the operand of `-` is a number, not {show(found)}", expr.span)
            return ANY
        return found

    def _field(self, expr: Field, found: Type) -> Type:
        match found:
            case AnyType():
                return ANY
            case Record(fields=fields):
                field = found.get(expr.name)
                if field is not None:
                    return field
                names = [name for name, _ in fields]
                self._error(
                    "no-such-field",
                    f"there is no field `{expr.name}` in {show(found)}",
                    expr.span,
                    help=did_you_mean(expr.name, names),
                )
            case _:
                self._error("no-such-field", f"{show(found)} has no fields", expr.span)
        return ANY

    def _index(self, expr: Index, found: Type, index: Type) -> Type:
        if not types.fits(index, INT):
            self._error("wrong-operand", f"an index is int, not {show(index)}", expr.index.span)
        if isinstance(found, AnyType):
            return ANY
        if not isinstance(found, ListOf):
            self._error("wrong-operand", f"only a list has items, not {show(found)}", expr.span)
            return ANY
        if is_constant(expr.index) and isinstance(index, types.Int):
            try:
                place = const_int(expr.index)
            except PlanError as error:
                for diagnostic in error.diagnostics:
                    self._report(diagnostic)
                return found.elem
            if place < 0 or (found.most is not None and place >= found.most):
                room = "indices count from 0" if place < 0 else f"the list has at most {found.most} items, from 0"
                self._error("index-out-of-range", f"there is never an item {place}", expr.index.span, help=room)
        return found.elem

    def _apply(self, expr: Apply, scope: Scope) -> Type:
        name = expr.function
        if name not in BUILTINS and name not in self._functions:
            return self._unknown(expr, scope)
        named = next((arg for arg in expr.args if arg.name is not None), None)
        if named is not None:
            self._error("bad-call", f"`{name}` takes no named arguments", named.span)
        args = [self.infer(arg.value, scope) for arg in expr.args]
        if name not in BUILTINS:
            return ANY
        takes = BUILTINS[name]
        if len(args) != takes:
            self._error(
                "bad-call", f"`{name}` takes {takes} argument{'s' if takes > 1 else ''}, not {len(args)}", expr.span
            )
            return INT if name == "len" else ListOf(TEXT) if name == "lines" else BOOL
        first = expr.args[0].value.span
        match name:
            case "len":
                if not isinstance(args[0], Text | ListOf | AnyType):
                    self._error("wrong-operand", f"`len` takes a text or a list, not {show(args[0])}", first)
                return INT
            case "lines":
                if not types.fits(args[0], TEXT):
                    self._error("wrong-operand", f"`lines` takes a text, not {show(args[0])}", first)
                return ListOf(TEXT)
            case "in":
                self._in(expr, args[0], args[1])
                return BOOL
            case _:
                for arg, found in zip(expr.args, args, strict=True):
                    if not types.fits(found, TEXT):
                        self._error("wrong-operand", f"`matches` takes texts, not {show(found)}", arg.value.span)
                pattern = literal(expr.args[1].value)
                reason = check_regex(pattern) if pattern is not None else ""
                if reason:
                    self._error("bad-regex", f"the pattern cannot be used: {reason}", expr.args[1].value.span)
                return BOOL

    def _in(self, expr: Apply, item: Type, where: Type) -> None:
        match where:
            case AnyType():
                return
            case ListOf(elem=elem):
                fine = types.comparable(item, elem)
            case Text():
                fine = types.fits(item, TEXT)
            case _:
                self._error("wrong-operand", f"`in` looks in a list or a text, not in {show(where)}", expr.span)
                return
        if not fine:
            self._error("compare-types", f"`in` looks for {show(item)} in {show(where)}, where it never is", expr.span)

    def _unknown(self, expr: Apply, scope: Scope) -> Type:
        name = expr.function
        if name in self._plans:
            self._error(
                "plan-in-expression",
                f"the plan `{name}` runs as a statement of its own",
                expr.span,
                help=f"write `x = {name}(...);` before, and use `x` here",
            )
        elif name == "ids":
            self._error("misplaced-type", "`ids` stands in `recorded=ids(...)` alone", expr.span)
        elif name in TYPE_WORDS:
            self._error("misplaced-type", f"`{name}` is a type of a `gen`", expr.span, help="write `gen(type=...)`")
        else:
            near = did_you_mean(name, [*BUILTINS, *self._functions, *self._plans])
            self._error(
                "unknown-function",
                f"there is no function `{name}`",
                Span(expr.span.start, expr.span.start + len(name)) if expr.span.end else expr.span,
                help=near or f"the caller registers host functions by name; built in are {_names(BUILTINS)}",
            )
        for arg in expr.args:
            self.infer(arg.value, scope)
        return ANY

    def _error(self, code: str, message: str, span: Span, *, help: str = "") -> None:
        self._report(Diagnostic(code, message, span, help=help))


def _is_zero(expr: Expr) -> bool:
    try:
        return const_int(expr) == 0
    except PlanError:
        return isinstance(expr, Float) and expr.value == 0


def _names(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
