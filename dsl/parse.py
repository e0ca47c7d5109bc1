"""From a plan's text to its abstract syntax.

lark reads the tokens and calls `_Builder` as it reduces each rule, so no parse tree is built. The grammar knows calls
and braces only; which words are statements, and what shape each has, is decided in `shapes`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from math import isfinite
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedInput

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source, Span, did_you_mean
from anabranch.dsl.grammar import lark_parser
from anabranch.dsl.shapes import EXAMPLES, After, BareCall, Bind, Item, RawBlock, RawCall, Shaper, Tail
from anabranch.dsl.strings import read_string
from anabranch.dsl.syntax_errors import Stop, explain

MAX_FILE_BYTES: Final = 16 * 2**20
"""The largest plan file that is read."""

MAX_BRACKETS: Final = 64
"""How many brackets, of any kind, may be open at once."""

MAX_DEPTH: Final = 160
"""How deep the abstract syntax may nest: a block is two levels, an operator one.

Python's own comparison of two trees takes four of its 1,000 frames a level, which makes it safe, and so any function
that takes no more.
"""

MAX_DIGITS: Final = 1000
"""The longest number, in characters; Python refuses to read an int of more than 4,300 digits."""


MAX_ERRORS: Final = 20
"""How many errors of one text are reported."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")

_MAX_KEPT: Final = 1000
"""How many are kept until they are put in the order of the text."""


def read_source(path: str | PathLike[str]) -> Source:
    """The text of a plan file, named as the user wrote it.

    The file is UTF-8; a byte-order mark is dropped, and `\\r\\n` becomes `\\n`. Raises PlanError (without a span) when
    the file is missing, a directory, unreadable, empty, larger than `MAX_FILE_BYTES` or not UTF-8.
    """
    source = read_exactly(path)
    text = source.text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        help = "a plan is written `name = plan(question) { ... }`"
        raise PlanError(Diagnostic("empty-file", f"`{source.name}` is empty", help=help), Source(source.name, ""))
    return Source(source.name, text)


def read_exactly(path: str | PathLike[str]) -> Source:
    """The text of a UTF-8 file as it is, byte-order mark and line ends included, named as the user wrote it.

    Raises PlanError (without a span) when the file is missing, a directory, unreadable, larger than `MAX_FILE_BYTES` or
    not UTF-8.
    """
    name = fspath(path)

    def refuse(code: str, message: str, help: str) -> NoReturn:
        raise PlanError(Diagnostic(code, message, help=help), Source(name, ""))

    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        refuse("no-such-file", f"there is no file `{name}`", "check the path")
    except IsADirectoryError:
        refuse("is-a-directory", f"`{name}` is a directory", "name a file")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        refuse("unreadable-file", f"`{name}` can't be read: {reason}", "check the path and its permissions")
    if len(data) > MAX_FILE_BYTES:
        refuse(
            "file-too-large", f"`{name}` is larger than {MAX_FILE_BYTES // 2**20} MiB", "split it into several files"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(
            "not-utf-8",
            f"`{name}` is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            "save the file as UTF-8",
        )
    return Source(name, text)


def parse(source: Source) -> ast.Program:
    """The program written in `source`. Raises PlanError.

    Reading stops at the first syntax error. Statements of the wrong shape before it are reported with it, in the order
    of the text; at most `MAX_ERRORS` are.
    """
    if (half := _SURROGATE.search(source.text)) is not None:
        raise PlanError(
            Diagnostic(
                "bad-character",
                f"this is half a character (U+{ord(half[0]):04X}), which no file can hold",
                Span(half.start(), half.end()),
                help="remove it: decode text from UTF-8, or UTF-16, as a whole",
            ),
            source,
        )
    reader = _reader()
    with reader.lock:
        return reader.read(source)


def parse_text(text: str, name: str = "<plan>") -> ast.Program:
    """The program written in `text`; `name` stands for the file in errors. Raises PlanError."""
    return parse(Source(name, text))


@cache
def _reader() -> _Reader:
    return _Reader()


class _Reader:
    """The parser with its callbacks. They hold the state of the one text being read, hence the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._builder = _Builder()
        self._brackets = _Brackets()
        self._lark: Lark = lark_parser(self._builder, self._brackets)
        self._brackets.learn(self._lark)

    def read(self, source: Source) -> ast.Program:
        self._builder.begin(source)
        self._brackets.begin(source)
        try:
            # A comment must end in a newline.
            plans: tuple[ast.PlanDef, ...] = self._lark.parse(source.text + "\n")  # type: ignore[assignment]
            if errors := self._builder.finish(plans):
                raise _together(errors, source)
            program = ast.Program(plans, source)
            if self._brackets.deepest > MAX_DEPTH:
                _check_depth(program)
            return program
        except UnexpectedInput as error:
            raise _together([*self._builder.errors, explain(error, source, self._brackets.stop())], source) from None
        finally:
            self._builder.begin(source)


def _together(errors: list[Diagnostic], source: Source) -> PlanError:
    errors.sort(key=lambda error: error.span.start if error.span else 0)
    return PlanError(errors[:MAX_ERRORS], source)


class _Brackets:
    """Watches the tokens go by: which brackets are open, and how deep the syntax may become.

    deepest: at least the depth of the abstract syntax so far, never less
    """

    always_accept: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._role: dict[str, str] = {}
        self._spelled: dict[str, str] = {}

    def learn(self, lark: Lark) -> None:
        """Find what lark has called each bracket and operator."""
        roles = dict.fromkeys("([{", "open") | dict.fromkeys(")]}", "close") | dict.fromkeys(",;:=", "part")
        roles |= dict.fromkeys(("+", "-", "*", "/", "!", ".", "&&", "||"), "operator")
        self._role["COMPARE"] = "operator"
        for terminal in lark.terminals:
            if terminal.pattern.type == "str":
                self._spelled[terminal.name] = terminal.pattern.value
                if terminal.pattern.value in roles:
                    self._role[terminal.name] = roles[terminal.pattern.value]

    def begin(self, source: Source) -> None:
        self._source = source
        self._open: list[Token] = []
        self._last: tuple[Token | None, Token | None] = (None, None)
        self.deepest = 0

    def stop(self) -> Stop:
        """Where reading is now."""
        return Stop(tuple(self._open), self._last, self._spelled)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        role = self._role
        # A file's Program, PlanDef and Block, and a leaf with the statement and the parts around it.
        level = 8
        outer: list[int] = []
        last: Token | None = None
        for token in stream:
            self._last = (last, token)
            last = token
            match role.get(token.type):
                case None:
                    pass
                case "open":
                    # A block holds statements, a call arguments: two levels. An index is an operator besides.
                    level += 1
                    outer.append(level)
                    level += 2
                    self._open.append(token)
                    if len(outer) > MAX_BRACKETS:
                        self._too_deep(token)
                case "close":
                    if outer:
                        level = outer.pop()
                        # Kept when it closes nothing or another kind: the parser stops there, and asks what is open.
                        if self._open[-1] + token in ("()", "[]", "{}"):
                            self._open.pop()
                case "part":
                    level = outer[-1] + 2 if outer else 8
                case _:
                    level += 1
            if level > self.deepest:
                self.deepest = level
            yield token

    def _too_deep(self, token: Token) -> NoReturn:
        start = token.start_pos or 0
        raise PlanError(
            Diagnostic(
                "too-deep",
                f"more than {MAX_BRACKETS} brackets are open here",
                Span(start, start + 1),
                help="split the plan into several plans that call one another",
            ),
            self._source,
        )


def _check_depth(program: ast.Program) -> None:
    """Refuse a program deeper than `MAX_DEPTH`. Goes level by level, since a deep one can't be recursed over."""
    level: list[Any] = list(program.plans)
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            for field in fields(node):
                value = getattr(node, field.name)
                for child in value if isinstance(value, tuple) else (value,):
                    if is_dataclass(child) and not isinstance(child, Span):
                        below.append(child)
        if not below:
            return
        level = below
    raise PlanError(
        Diagnostic(
            "too-deep",
            f"this nests more than {MAX_DEPTH} levels deep",
            level[0].span,
            help="bind parts of it to names first, or split the plan",
        ),
        program.source,
    )


_Children: TypeAlias = list[Any]
"""What a rule is reduced from: tokens, and what the rules below have returned."""


class _Builder(Transformer[Token, Any]):
    """The abstract syntax of each rule, from that of its parts. Called as lark reduces."""

    def begin(self, source: Source) -> None:
        self._text = source.text
        self.errors: list[Diagnostic] = []
        self._shaper = Shaper(self._report)
        self._loose: list[RawCall] = []

    def finish(self, plans: tuple[ast.PlanDef, ...]) -> list[Diagnostic]:
        """Resolve what needs the whole file; the errors found."""
        self._shaper.resolve({plan.name: plan for plan in plans})
        return self.errors

    def _report(self, error: Diagnostic) -> None:
        if len(self.errors) < _MAX_KEPT:
            self.errors.append(error)

    # The methods below are named after the grammar's rules.

    def start(self, plans: _Children) -> tuple[ast.PlanDef, ...]:
        return tuple(plans)

    def plan(self, children: _Children) -> ast.PlanDef:
        name, _, word, _, params, _, opened, *items, closed = children
        start = name.start_pos
        if word != "plan":
            self._report(
                Diagnostic(
                    "not-a-plan",
                    f"`{word.value}` is no plan",
                    _token_span(word),
                    help=did_you_mean(word.value, ["plan"])
                    or f"a file holds plans: `{name.value} = plan(...) {{ ... }}`",
                )
            )
        self._refuse_loose(start)
        body = self._shaper.block(RawBlock(_items(items), Span(opened.start_pos, closed.end_pos)))
        plain: list[ast.Param] = []
        options: dict[str, ast.Option] = {}
        for param in params or ():
            if isinstance(param, ast.Param):
                plain.append(param)
            elif param.name in options:
                self._report(
                    Diagnostic(
                        "repeated-option", f"option `{param.name}` is given twice", param.span, help="keep one of them"
                    )
                )
            else:
                options[param.name] = param
        return ast.PlanDef(name.value, tuple(plain), tuple(options.values()), body, Span(start, closed.end_pos))

    def params(self, children: _Children) -> _Children:
        return children[::2]

    def param(self, children: _Children) -> ast.Param | ast.Option:
        name = children[0]
        if len(children) == 1:
            return ast.Param(name.value, None, _token_span(name))
        _, separator, value = children
        span = Span(name.start_pos, value.span.end)
        if separator == "=":
            return ast.Option(name.value, value, span)
        return ast.Param(name.value, value, span)

    def block(self, children: _Children) -> RawBlock:
        return RawBlock(_items(children[1:-1]), Span(children[0].start_pos, children[-1].end_pos))

    def stmt(self, children: _Children) -> Item | None:
        bound, _, expr, tail, semicolon = children
        start = bound.start_pos if bound is not None else expr.span.start
        span = Span(start, semicolon.end_pos)
        name = bound.value if bound is not None else None
        call: RawCall | None = None
        if isinstance(expr, RawCall):
            call = self._loose.pop()
        elif isinstance(expr, ast.Apply) and expr.function == "text":
            call = RawCall("text", expr.args, expr.span)
        self._refuse_loose(start)
        if call is not None:
            return self._shaper.statement(name, call, tail, span)
        if tail is not None:
            self._refuse_tail(expr, tail)
            return None
        if name is not None:
            return ast.Let(name, expr, span)
        if isinstance(expr, ast.Apply):
            return BareCall(expr, span)
        self._report(_bare_expression(expr))
        return None

    def tail(self, children: _Children) -> Tail:
        return Tail(*children)

    def after(self, children: _Children) -> After:
        word, *rest = children
        if word == "join":
            return After("join", Span(word.start_pos, rest[-1].end_pos), args=rest[1] or ())
        if word == "else":
            return After("else", Span(word.start_pos, rest[0].span.end), block=rest[0])
        return After("until", Span(word.start_pos, rest[-1].end_pos), expr=rest[1])

    def args(self, children: _Children) -> tuple[ast.Arg | Bind, ...]:
        return tuple(children[::2])

    def arg(self, children: _Children) -> ast.Arg | Bind:
        if len(children) == 1:
            value = children[0]
            return ast.Arg(None, value, value.span)
        name, separator, value = children
        span = Span(name.start_pos, value.span.end)
        return ast.Arg(name.value, value, span) if separator == "=" else Bind(name.value, value, span)

    def call(self, children: _Children) -> ast.Apply | RawCall:
        name, _, args, closed = children
        word = name.value
        span = Span(name.start_pos, closed.end_pos)
        args = args or ()
        # `text(2000)` is also the bound of a parameter.
        if (word in _STATEMENTS and word != "text") or any(isinstance(arg, Bind) for arg in args):
            call = RawCall(word, args, span)
            self._loose.append(call)
            return call
        return ast.Apply(word, args, span)

    def list(self, children: _Children) -> ast.List:
        opened, items, closed = children
        return ast.List(items or (), Span(opened.start_pos, closed.end_pos))

    def items(self, children: _Children) -> tuple[ast.Expr, ...]:
        return tuple(children[::2])

    def paren(self, children: _Children) -> ast.Expr | RawCall:
        opened, inner, closed = children
        if isinstance(inner, RawCall):
            return inner
        wider: ast.Expr = replace(inner, span=Span(opened.start_pos, closed.end_pos))
        return wider

    def field(self, children: _Children) -> ast.Field:
        value, _, name = children
        return ast.Field(value, name.value, Span(value.span.start, name.end_pos))

    def index(self, children: _Children) -> ast.Index:
        value, _, index, closed = children
        return ast.Index(value, index, Span(value.span.start, closed.end_pos))

    def name(self, children: _Children) -> ast.Name | ast.Bool:
        token = children[0]
        span = Span(token.start_pos, token.end_pos)
        word = token.value
        if word == "true" or word == "false":
            return ast.Bool(word == "true", span)
        return ast.Name(word, span)

    def number(self, children: _Children) -> ast.Int | ast.Float:
        token = children[0]
        span = _token_span(token)
        if len(token) > MAX_DIGITS:
            self._report(
                Diagnostic(
                    "number-too-large",
                    f"this number has more than {MAX_DIGITS} characters",
                    span,
                    help="write a shorter one",
                )
            )
            return ast.Int(0, span)
        if token.type == "INT":
            return ast.Int(int(token.value), span)
        value = float(token.value)
        if not isfinite(value):
            self._report(
                Diagnostic(
                    "number-too-large", "this number is too large for a float", span, help="the largest is 1.8e308"
                )
            )
            return ast.Float(0.0, span)
        return ast.Float(value, span)

    def string(self, children: _Children) -> ast.Str:
        token = children[0]
        return read_string(token.value, token.start_pos, self._report)

    def unary(self, children: _Children) -> ast.Expr:
        op, operand = children
        span = Span(op.start_pos, operand.span.end)
        # A literal has its sign, unless it stands in brackets of its own.
        if op == "-" and self._text[operand.span.start].isdigit():
            match operand:
                case ast.Int(value):
                    return ast.Int(-value, span)
                case ast.Float(value):
                    return ast.Float(-value, span)
        return ast.Unary(op.value, operand, span)

    def _binary(self, children: _Children) -> ast.Binary:
        left, op, right = children
        return ast.Binary(op.value, left, right, Span(left.span.start, right.span.end))

    expr = conj = cmp = sum = term = _binary

    def _refuse_loose(self, start: int) -> None:
        """Report the statements that stand inside an expression of what began at `start`."""
        while self._loose and self._loose[-1].span.start >= start:
            call = self._loose.pop()
            if call.word in _STATEMENTS:
                self._report(
                    Diagnostic(
                        "nested-statement",
                        f"`{call.word}` is a statement and can't stand inside an expression",
                        call.word_span,
                        help=f"bind its value first: `x = {call.word}(...);`, then use `x`",
                    )
                )
            else:
                bind = next(arg for arg in call.args if isinstance(arg, Bind))
                self._report(
                    Diagnostic(
                        "misplaced-binder",
                        f"`{call.word}` takes no `{bind.name}: value`",
                        bind.span,
                        help=f"an option is written `{bind.name}=value`",
                    )
                )

    def _refuse_tail(self, expr: ast.Expr, tail: Tail) -> None:
        word = expr.function if isinstance(expr, ast.Apply) else expr.id if isinstance(expr, ast.Name) else None
        if word is None:
            self._report(
                Diagnostic(
                    "unexpected-block",
                    "an expression takes no block",
                    Span(tail.block.span.start, tail.block.span.start + 1),
                    help="is a `;` missing before it?",
                )
            )
            return
        if isinstance(expr, ast.Name) and word in EXAMPLES:
            self._report(
                Diagnostic("missing-brackets", f"`{word}` needs brackets", expr.span, help=f"write `{EXAMPLES[word]}`")
            )
            return
        self._report(
            Diagnostic(
                "unknown-statement",
                f"`{word}` is no statement that takes a block",
                Span(expr.span.start, expr.span.start + len(word)),
                help=did_you_mean(word, ("fork", "branch", "map", "reduce", "loop", "if"))
                or "`fork`, `branch`, `map`, `reduce`, `loop` and `if` do",
            )
        )


_STATEMENTS: Final = frozenset(EXAMPLES) | {"plan"}


def _items(children: _Children) -> tuple[Item, ...]:
    """The statements of a block, without those that were refused."""
    return tuple(child for child in children if child is not None)


def _token_span(token: Token) -> Span:
    return Span(token.start_pos or 0, token.end_pos or 0)


def _bare_expression(expr: ast.Expr) -> Diagnostic:
    if isinstance(expr, ast.Name) and expr.id in EXAMPLES:
        return Diagnostic(
            "missing-brackets", f"`{expr.id}` needs brackets", expr.span, help=f"write `{EXAMPLES[expr.id]}`"
        )
    return Diagnostic(
        "bare-expression",
        "an expression alone does nothing",
        expr.span,
        help="bind it: `x = ...;`, or give it back: `return(...);`",
    )
