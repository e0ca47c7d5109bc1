"""Values at run time: expressions evaluated, values written into text and compared as votes.

The engine and the reference share this, so a value never depends on which of them ran. Nothing here may take long
or grow without end, whatever a model wrote: text, integers and lists are bounded, and a value is a tree of at most
`MAX_NODES` nodes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

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
from anabranch.dsl.diagnostics import Span
from anabranch.dsl.patterns import PatternTooComplex, full_match
from anabranch.dsl.spec import Value

MAX_TEXT = 1_000_000  # characters of a text
MAX_DIGITS = 4_300  # decimal digits of an int, which is Python's own limit for reading and writing one
MAX_NODES = 100_000  # values in a list or record, with those inside it
MAX_NESTING = 64  # lists and records inside one another
MAX_MATCH = 100_000  # characters that `matches` reads

_INT_LIMIT = 10**MAX_DIGITS
_INT_BITS = _INT_LIMIT.bit_length()

Call = Callable[[str, list[Value]], Value]


class EvaluationError(Exception):
    """An expression has no value: the branch fails with `reason`. `span`: the part at fault."""

    def __init__(self, reason: str, span: Span | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.span = span


def evaluate(expr: Expr, env: Mapping[str, Value], call: Call) -> Value:
    """The value of `expr`.

    env: values by name
    call: runs the host function of a name; what it raises fails the branch, as does a result that is no value
    Raises EvaluationError.
    """
    # As in the checker, the left spine is walked: operators pile up there without brackets.
    spine: list[Binary | Field | Index | Unary] = []
    node = expr
    while True:
        match node:
            case Binary(left=inner) | Field(value=inner) | Index(value=inner) | Unary(operand=inner):
                spine.append(node)
                node = inner
            case _:
                break
    value = _atom(node, env, call)
    for outer in reversed(spine):
        match outer:
            case Binary(op="&&" | "||" as op):
                if not isinstance(value, bool):
                    raise EvaluationError(f"an operand of `{op}` is {kind(value)}, not a bool", outer.left.span)
                if value == (op == "&&"):
                    value = evaluate(outer.right, env, call)
                    if not isinstance(value, bool):
                        raise EvaluationError(f"an operand of `{op}` is {kind(value)}, not a bool", outer.right.span)
            case Binary():
                value = _binary(outer, value, evaluate(outer.right, env, call))
            case Field():
                value = _field(outer, value)
            case Index():
                value = _index(outer, value, evaluate(outer.index, env, call))
            case Unary():
                value = _unary(outer, value)
    return value


def parts(expr: Expr, env: Mapping[str, Value], call: Call | None = None) -> tuple[tuple[str, bool], ...]:
    """The text that writing `expr` writes, in pieces (text, is_literal).

    A piece is literal if it stands in the plan's own text; special tokens are split in those alone. No piece is
    empty, and neighbours of one kind are one piece. Raises EvaluationError.
    """
    found: list[tuple[str, bool]] = []
    length = 0

    def add(text: str, is_literal: bool) -> None:
        nonlocal length
        length += len(text)
        if length > MAX_TEXT:
            raise EvaluationError(f"a text is longer than {MAX_TEXT} characters", expr.span)
        if found and found[-1][1] == is_literal:
            found[-1] = (found[-1][0] + text, is_literal)
        elif text:
            found.append((text, is_literal))

    run = _no_functions if call is None else call
    if isinstance(expr, Str):
        for part in expr.parts:
            if isinstance(part, str):
                add(part, True)
            else:
                add(render(evaluate(part, env, run)), False)
    else:
        add(render(evaluate(expr, env, run)), False)
    return tuple(found)


def render(value: Value) -> str:
    """The value as text: an item of a list a line, `name: value` a line for a record, `true`, `false`, `null`.

    Raises EvaluationError above `MAX_TEXT` characters.
    """
    pieces: list[str] = []
    length = 0
    for piece in _pieces(value):
        length += len(piece)
        if length > MAX_TEXT:
            raise EvaluationError(f"a text is longer than {MAX_TEXT} characters")
        pieces.append(piece)
    return "".join(pieces)


def checked(value: object, what: str = "a value") -> Value:
    """`value` as a value of the language: tuples become lists. `what` names it in the error.

    Raises EvaluationError for what is none: other classes, floats that are not finite, names that are no strings,
    and what is too large or nests too deep.
    """
    left = [MAX_NODES]
    return _checked(value, what, 0, left)


def equal(a: Value, b: Value) -> bool:
    """Whether the values are equal: of one kind, an int and a float by their number. A bool equals no number."""
    waiting = [(a, b)]
    while waiting:
        x, y = waiting.pop()
        if isinstance(x, list) and isinstance(y, list):
            if len(x) != len(y):
                return False
            waiting.extend(zip(x, y, strict=True))
        elif isinstance(x, dict) and isinstance(y, dict):
            if x.keys() != y.keys():
                return False
            waiting.extend((x[name], y[name]) for name in x)
        elif is_number(x) and is_number(y):
            if x != y:
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True


def vote_key(value: Value, by: Literal["exact", "casefold", "number"]) -> object | None:
    """What two votes must have in common to be one: hashable, and None for a value that casts no vote.

    exact: the value itself, an int and a float of one number alike
    casefold: text without case and without white space around it; other values as under exact
    number: the number that the value is or that its text writes; what is no number casts no vote
    """
    if by == "number":
        return _as_number(value)
    if by == "casefold" and isinstance(value, str):
        return "text", value.strip().casefold()
    return _hashable(value)


def is_number(value: Value) -> bool:
    """Whether the value is an int or a float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def kind(value: Value) -> str:
    """What the value is, for a person."""
    match value:
        case bool():
            return "a bool"
        case int():
            return "an int"
        case float():
            return "a float"
        case str():
            return "a text"
        case list():
            return "a list"
        case dict():
            return "a record"
        case None:
            return "null"
        case _:
            return f"a {type(value).__name__}"


def _no_functions(name: str, args: list[Value]) -> Value:
    raise EvaluationError(f"there is no function `{name}`")


def _atom(expr: Expr, env: Mapping[str, Value], call: Call) -> Value:
    match expr:
        case Name(id=name):
            if name not in env:
                raise EvaluationError(f"`{name}` is not bound", expr.span)
            return env[name]
        case Int(value=value):
            return value
        case Float(value=value):
            return value
        case Bool(value=value):
            return value
        case Str(parts=written):
            length = 0
            pieces = []
            for part in written:
                piece = part if isinstance(part, str) else render(evaluate(part, env, call))
                length += len(piece)
                if length > MAX_TEXT:
                    raise EvaluationError(f"a text is longer than {MAX_TEXT} characters", expr.span)
                pieces.append(piece)
            return "".join(pieces)
        case List(items=items):
            made = [evaluate(item, env, call) for item in items]
            _within_bounds(made, expr.span)
            return made
        case Apply():
            return _apply(expr, env, call)
        case _:
            raise TypeError(f"not an expression: {expr!r}")


def _binary(expr: Binary, a: Value, b: Value) -> Value:
    op = expr.op
    if op in ("==", "!="):
        return equal(a, b) == (op == "==")
    if op in ("<", "<=", ">", ">="):
        if not ((is_number(a) and is_number(b)) or (isinstance(a, str) and isinstance(b, str))):
            raise EvaluationError(f"`{op}` orders two numbers or two texts, not {kind(a)} and {kind(b)}", expr.span)
        return bool({"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[op])
    if op == "+" and isinstance(a, str) and isinstance(b, str):
        if len(a) + len(b) > MAX_TEXT:
            raise EvaluationError(f"a text is longer than {MAX_TEXT} characters", expr.span)
        return a + b
    if not (is_number(a) and is_number(b)):
        wanted = "two numbers or two texts" if op == "+" else "two numbers"
        raise EvaluationError(f"`{op}` takes {wanted}, not {kind(a)} and {kind(b)}", expr.span)
    return _arithmetic(expr, a, b)


def _arithmetic(expr: Binary, a: int | float, b: int | float) -> int | float:
    op = expr.op
    try:
        if op == "/":
            value: int | float = a / b
        elif op == "+":
            value = a + b
        elif op == "-":
            value = a - b
        else:
            if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > _INT_BITS + 1:
                raise EvaluationError(f"a number has more than {MAX_DIGITS} digits", expr.span)
            value = a * b
    except ZeroDivisionError:
        raise EvaluationError("a division by zero", expr.span) from None
    except OverflowError:
        raise EvaluationError("a number is too large for a float", expr.span) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise EvaluationError("a number is too large for a float", expr.span)
    if isinstance(value, int) and not -_INT_LIMIT < value < _INT_LIMIT:
        raise EvaluationError(f"a number has more than {MAX_DIGITS} digits", expr.span)
    return value


def _unary(expr: Unary, value: Value) -> Value:
    if expr.op == "!":
        if not isinstance(value, bool):
            raise EvaluationError(f"the operand of `!` is {kind(value)}, not a bool", expr.span)
        return not value
    if not is_number(value):
        raise EvaluationError(f"the operand of `-` is {kind(value)}, not a number", expr.span)
    return -value


def _field(expr: Field, value: Value) -> Value:
    if not isinstance(value, dict):
        raise EvaluationError(f"{kind(value)} has no field `{expr.name}`", expr.span)
    if expr.name not in value:
        raise EvaluationError(f"the record has no field `{expr.name}`", expr.span)
    return value[expr.name]


def _index(expr: Index, value: Value, index: Value) -> Value:
    if not isinstance(value, list):
        raise EvaluationError(f"only a list has items, not {kind(value)}", expr.span)
    if not isinstance(index, int) or isinstance(index, bool):
        raise EvaluationError(f"an index is an int, not {kind(index)}", expr.index.span)
    if not 0 <= index < len(value):
        shown = index if abs(index) < 10**18 else "that far"
        raise EvaluationError(f"there is no item {shown} in a list of {len(value)}", expr.index.span)
    return value[index]


def _apply(expr: Apply, env: Mapping[str, Value], call: Call) -> Value:
    name = expr.function
    args = [evaluate(arg.value, env, call) for arg in expr.args]
    match name, args:
        case "len", [str() | list() as value]:
            return len(value)
        case "lines", [str() as text]:
            return [line for line in (line.strip() for line in text.split("\n")) if line]
        case "in", [item, list() as items]:
            return any(equal(item, other) for other in items)
        case "in", [str() as item, str() as text]:
            return item in text
        case "matches", [str() as text, str() as pattern]:
            return _matches(expr, text, pattern)
        case (("len" | "lines" | "in" | "matches"), _):
            shown = ", ".join(kind(arg) for arg in args)
            raise EvaluationError(f"`{name}` cannot take {shown or 'nothing'}", expr.span)
        case _:
            return _host(expr, args, call)


def _host(expr: Apply, args: list[Value], call: Call) -> Value:
    name = expr.function
    try:
        value = call(name, args)
    except EvaluationError as error:
        raise EvaluationError(error.reason, error.span or expr.span) from error
    except Exception as error:  # whatever a host function raises fails the branch
        message = str(error)[:500]
        raise EvaluationError(
            f"`{name}` raised {type(error).__name__}{': ' + message if message else ''}", expr.span
        ) from error
    try:
        return checked(value, f"what `{name}` returned")
    except EvaluationError as error:
        raise EvaluationError(error.reason, expr.span) from None


def _matches(expr: Apply, text: str, pattern: str) -> bool:
    if len(text) > MAX_MATCH:
        raise EvaluationError(f"`matches` reads at most {MAX_MATCH} characters, not {len(text)}", expr.span)
    try:
        return full_match(pattern, text)
    except ValueError as error:
        raise EvaluationError(f"the pattern cannot be used: {error}", expr.span) from None
    except PatternTooComplex:
        raise EvaluationError("the pattern is too complex for this text", expr.span) from None


def _pieces(value: Value) -> Iterator[str]:
    """The text of `value`, piece by piece. Separators wait among the values, as they are text too."""
    waiting: list[tuple[Value, int]] = [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        match value:
            case str():
                yield value
            case bool():
                yield "true" if value else "false"
            case int():
                if not -_INT_LIMIT < value < _INT_LIMIT:
                    raise EvaluationError(f"a number has more than {MAX_DIGITS} digits")
                yield str(value)
            case float():
                yield repr(value)
            case None:
                yield "null"
            case list() | dict() if depth >= MAX_NESTING:
                raise EvaluationError(f"a value nests deeper than {MAX_NESTING}")
            case list():
                for i in range(len(value) - 1, -1, -1):
                    waiting.append((value[i], depth + 1))
                    if i:
                        waiting.append(("\n", 0))
            case dict():
                names = list(value)
                for i in range(len(names) - 1, -1, -1):
                    waiting.append((value[names[i]], depth + 1))
                    waiting.append((f"\n{names[i]}: " if i else f"{names[i]}: ", 0))
            case _:
                raise EvaluationError(f"{kind(value)} is no value of the language")


def _checked(value: object, what: str, depth: int, left: list[int]) -> Value:
    left[0] -= 1
    if left[0] < 0:
        raise EvaluationError(f"{what} holds more than {MAX_NODES} values")
    match value:
        case None | bool():
            return value
        case str():
            if len(value) > MAX_TEXT:
                raise EvaluationError(f"{what} is longer than {MAX_TEXT} characters")
            return str(value)
        case int():
            if not -_INT_LIMIT < value < _INT_LIMIT:
                raise EvaluationError(f"{what} is a number of more than {MAX_DIGITS} digits")
            return int(value)
        case float():
            if not math.isfinite(value):
                raise EvaluationError(f"{what} is {value}, which is no number of the language")
            return float(value)
        case list() | tuple() | dict() if depth >= MAX_NESTING:
            raise EvaluationError(f"{what} nests deeper than {MAX_NESTING}")
        case list() | tuple():
            return [_checked(item, what, depth + 1, left) for item in value]
        case dict():
            for name in value:
                if not isinstance(name, str):
                    raise EvaluationError(f"{what} has a field whose name is {kind(name)}, not a text")
            return {name: _checked(item, what, depth + 1, left) for name, item in value.items()}
        case _:
            raise EvaluationError(f"{what} is {kind(value)}, which is no value of the language")


def _within_bounds(made: list[Value], span: Span) -> None:
    """Refuse a list that is too large as a tree: `[x, x]` over and over would double in size each time."""
    nodes = 0
    waiting: list[tuple[Value, int]] = [(made, 1)]
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise EvaluationError(f"a list holds more than {MAX_NODES} values", span)
        if isinstance(value, list | dict):
            if depth > MAX_NESTING:
                raise EvaluationError(f"a list nests deeper than {MAX_NESTING}", span)
            waiting.extend((item, depth + 1) for item in (value if isinstance(value, list) else value.values()))


def _as_number(value: Value) -> object | None:
    if isinstance(value, str):
        text = value.strip().replace(",", "") if re.fullmatch(_GROUPED, value.strip()) else value.strip()
        if len(text) > MAX_DIGITS or re.fullmatch(_NUMBER, text) is None:
            return None
        value = float(text) if "." in text or "e" in text.lower() else int(text)
        if isinstance(value, float) and not math.isfinite(value):
            return None
    return ("number", value) if is_number(value) else None


# Each alternative begins differently and no repetition nests, so neither can backtrack far.
_NUMBER = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?"
_GROUPED = r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?"


def _hashable(value: Value) -> object:
    match value:
        case bool():
            return "bool", value
        case int() | float():
            return "number", value
        case str():
            return "text", value
        case list():
            return "list", tuple(_hashable(item) for item in value)
        case dict():
            return "record", frozenset((name, _hashable(item)) for name, item in value.items())
        case _:
            return "null", None
