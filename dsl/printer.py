"""Syntax to text: canonical plan text, formatted source with its comments, and a tree for the eye."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from typing import TypeAlias, assert_never

from anabranch.dsl import ast
from anabranch.dsl.comments import Remark, Remarks, braces, remarks
from anabranch.dsl.diagnostics import Source
from anabranch.dsl.parse import MAX_DIGITS, parse
from anabranch.dsl.shapes import EXAMPLES
from anabranch.dsl.strings import interpolated, write_string

WIDTH = 100
"""Where an argument list wraps, in characters."""

_STEP = 2
_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_LEVEL = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 3, "<=": 3, ">": 3, ">=": 3, "+": 4, "-": 4, "*": 5, "/": 5}
_COMPARISON = 3
_UNARY = 6
_POSTFIX = 7

_Printed: TypeAlias = ast.Program | ast.PlanDef | ast.Branch | ast.Stmt | ast.Expr


def print_plan(node: _Printed) -> str:
    """Canonical text: a statement a line, two spaces a level, no more brackets than needed.

    Of a program, `parse(print_plan(p)) == p`, and printing again gives the same text. A program's text ends in a
    newline, other text does not. Raises ValueError for what no text can say: a string that no quotes can hold, a name
    that is none, a number that is infinite or too long, syntax nested too deep.
    """
    try:
        return _print(node, Remarks(), "")
    except RecursionError:
        raise ValueError("this is nested too deep to be printed") from None


def format_source(source: Source) -> str:
    """The text of `source`, canonical, with its comments and with one blank line where there were some.

    The syntax stays the same, and formatting again changes nothing. A comment in the middle of a statement moves
    before it. Raises PlanError where `parse` does.
    """
    program = parse(source)
    return _print(program, remarks(program), source.text)


def _print(node: _Printed, notes: Remarks, text: str) -> str:
    printer = _Printer(notes, text)
    match node:
        case ast.Program(plans):
            printer.program(plans)
            return "\n".join(printer.lines) + "\n"
        case ast.PlanDef():
            printer.plan(node)
        case ast.Branch():
            printer.branch(node, 0)
        case (
            ast.Name()
            | ast.Int()
            | ast.Float()
            | ast.Bool()
            | ast.Str()
            | ast.List()
            | ast.Unary()
            | ast.Binary()
            | ast.Field()
            | ast.Index()
            | ast.Apply()
        ):
            return _expr(node)
        case _:
            printer.statement(node, 0)
    return "\n".join(printer.lines)


class _Printer:
    """Collects lines. `notes` holds the comments of `text`, both empty where there is no text to keep."""

    def __init__(self, notes: Remarks, text: str) -> None:
        self.lines: list[str] = []
        self._notes = notes
        self._text = text

    def program(self, plans: Sequence[ast.PlanDef]) -> None:
        for plan in plans:
            self._space()
            self._before(plan.span.start, 0)
            self.plan(plan)
        self._remarks(self._notes.at_end, 0)

    def plan(self, plan: ast.PlanDef) -> None:
        params = [
            _Piece(_name(p.name)) if p.bound is None else _Piece(f"{_name(p.name)}: ", p.bound) for p in plan.params
        ]
        self._line(0, _group(f"{_name(plan.name)} = plan", [*params, *_options(plan.options)], " {", 0))
        self._block(plan.body, 0)
        self.lines[-1] += "}"
        self._beside(plan.span.start)

    def branch(self, branch: ast.Branch, indent: int) -> None:
        self._head(indent, branch.label, "branch", [*_prompt(branch.prompt), *_options(branch.options)], " {")
        self._block(branch.body, indent)
        self.lines[-1] += "};"
        self._beside(branch.span.start)

    def statement(self, stmt: ast.Stmt, indent: int) -> None:
        match stmt:
            case ast.Write(role, value):
                self._head(indent, None, role, [_Piece("", value)], ";")
            case ast.Need(value):
                self._head(indent, None, "need", [_Piece("", value)], ";")
            case ast.Return(value):
                self._head(indent, None, "return", [_Piece("", value)], ";")
            case ast.Gen(name, prompt, options):
                self._head(indent, name, "gen", [*_prompt(prompt), *_options(options)], ";")
            case ast.Expand(name, prompt, options):
                self._head(indent, name, "expand", [*_prompt(prompt), *_options(options)], ";")
            case ast.Call(name, plan, args, options):
                self._head(indent, name, _callee(plan), [*map(_arg, args), *_options(options)], ";")
            case ast.Let(name, ast.Apply(function, args)):
                self._head(indent, name, _callee(function), [*map(_arg, args)], ";")
            case ast.Let(name, value):
                self._line(indent, f"{_name(name)} = {_wrapped(value, indent, len(name) + len(' = ;'))};")
            case ast.Fork(name, index, width, options, body, join):
                binder = "" if index is None else f"{_name(index)}: "
                self._head(indent, name, "fork", [_Piece(binder, width), *_options(options)], " {")
                self._block(body, indent)
                self._join(join, indent)
            case ast.Branches(name, options, branches, join):
                self._head(indent, name, "fork", _options(options), " {")
                key = braces(stmt, self._text).start if self._text else stmt.span.start
                self._open(key)
                for branch in branches:
                    self._before(branch.span.start, indent + _STEP)
                    self.branch(branch, indent + _STEP)
                self._close(key, indent, empty=False)
                self._join(join, indent)
            case ast.Map(name, index, item, over, options, body, join):
                pieces = [] if index is None else [_Piece(_name(index))]
                pieces += [_Piece(f"{_name(item)}: ", over), *_options(options)]
                self._head(indent, name, "map", pieces, " {")
                self._block(body, indent)
                self._join(join, indent)
            case ast.Reduce(name, item, over, options, body):
                self._head(indent, name, "reduce", [_Piece(f"{_name(item)}: ", over), *_options(options)], " {")
                self._block(body, indent)
                self.lines[-1] += "};"
            case ast.Loop(count, body, until):
                self._head(indent, None, "loop", [_Piece("", count)], " {")
                self._block(body, indent)
                if until is None:
                    self.lines[-1] += "};"
                else:
                    self.lines[-1] += _group("} until", [_Piece("", until)], ";", indent)
            case ast.If(cond, then, orelse):
                self._head(indent, None, "if ", [_Piece("", cond)], " {")
                self._block(then, indent)
                if orelse is not None:
                    self.lines[-1] += "} else {"
                    self._block(orelse, indent)
                self.lines[-1] += "};"
            case _:
                assert_never(stmt)
        self._beside(stmt.span.start)

    def _head(self, indent: int, name: str | None, word: str, pieces: Sequence[_Piece], tail: str) -> None:
        """The line `name = word(pieces)tail`, or the lines, if it has to be wrapped."""
        bound = "" if name is None else f"{_name(name)} = "
        self._line(indent, _group(bound + word, pieces, tail, indent))

    def _block(self, block: ast.Block, indent: int) -> None:
        """The statements after a `{`, up to the line on which the `}` is due."""
        self._open(block.span.start)
        for stmt in block.stmts:
            self._before(stmt.span.start, indent + _STEP)
            self.statement(stmt, indent + _STEP)
        self._close(block.span.start, indent, empty=not block.stmts)

    def _open(self, key: int) -> None:
        if (text := self._notes.opening.get(key)) is not None:
            self.lines[-1] += f"  {text}"

    def _close(self, key: int, indent: int, *, empty: bool) -> None:
        own = self._notes.closing.get(key, ())
        self._remarks(own, indent + _STEP)
        if not empty or own or key in self._notes.opening:
            self.lines.append(" " * indent)

    def _join(self, join: ast.Join | None, indent: int) -> None:
        if join is None:
            self.lines[-1] += "};"
        else:
            self.lines[-1] += "} join(" + ", ".join(_join_parts(join)) + ");"

    def _before(self, start: int, indent: int) -> None:
        self._remarks(self._notes.before.get(start, ()), indent)
        if start in self._notes.spaced:
            self._space()

    def _space(self) -> None:
        """One blank line, unless there is one or nothing is printed yet."""
        if self.lines and self.lines[-1]:
            self.lines.append("")

    def _beside(self, start: int) -> None:
        if (text := self._notes.beside.get(start)) is not None:
            self.lines[-1] += f"  {text}"

    def _remarks(self, own: Sequence[Remark], indent: int) -> None:
        for remark in own:
            if remark.blank_before:
                self._space()
            self._line(indent, remark.text)

    def _line(self, indent: int, text: str) -> None:
        self.lines.append(" " * indent + text)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One argument: `name=` or `name: ` and a value, a value alone, or a name alone."""

    lead: str
    value: ast.Expr | None = None

    def flat(self) -> str:
        return self.lead if self.value is None else self.lead + _expr(self.value)

    def wrapped(self, indent: int, used: int = 0) -> str:
        if self.value is None:
            return self.lead
        return self.lead + _wrapped(self.value, indent, used + len(self.lead) + len(","))


def _prompt(value: ast.Expr | None) -> list[_Piece]:
    return [] if value is None else [_Piece("", value)]


def _options(options: Sequence[ast.Option]) -> list[_Piece]:
    return [_Piece(f"{_name(option.name)}=", option.value) for option in options]


def _arg(arg: ast.Arg) -> _Piece:
    return _Piece("" if arg.name is None else f"{_name(arg.name)}=", arg.value)


def _group(head: str, pieces: Sequence[_Piece], tail: str, indent: int, brackets: str = "()") -> str:
    """`head(pieces)tail`, wrapped if one line does not hold it: a piece a line, or one piece wrapped in itself."""
    opened, closed = brackets[0], brackets[1]
    flat = f"{head}{opened}{', '.join(piece.flat() for piece in pieces)}{closed}{tail}"
    if not pieces or _fits(flat, indent):
        return flat
    if len(pieces) == 1:
        return f"{head}{opened}{pieces[0].wrapped(indent, len(head) + len(opened))}{closed}{tail}"
    inner = " " * (indent + _STEP)
    lines = ",\n".join(inner + piece.wrapped(indent + _STEP) for piece in pieces)
    return f"{head}{opened}\n{lines}\n{' ' * indent}{closed}{tail}"


def _fits(text: str, indent: int) -> bool:
    """Whether the line that `text` begins, and the one it ends, are short enough; what is between is a string's."""
    first, _, rest = text.partition("\n")
    return indent + len(first) <= WIDTH and len(rest.rpartition("\n")[2]) <= WIDTH


def _wrapped(value: ast.Expr, indent: int, used: int) -> str:
    """`value` on a line at `indent` of which `used` characters are taken; calls and lists wrap."""
    flat = _expr(value)
    if _fits(flat, indent + used):
        return flat
    match value:
        case ast.Apply(function, args):
            return _group(_function(function), [*map(_arg, args)], "", indent)
        case ast.List(items):
            return _group("", [_Piece("", item) for item in items], "", indent, "[]")
        case _:
            return flat


def _join_value(value: ast.JoinValue) -> str:
    args = [_expr(value.count)] if value.count is not None and value.kind != "all" else []
    if value.count is not None and value.kind == "all":
        args.append(f"min={_expr(value.count)}")
    if value.key is not None:
        args.append(_name(value.key))
    if value.by is not None:
        args.append(f"by={value.by}")
    return f"{value.kind}({', '.join(args)})" if args else value.kind


def _join_parts(join: ast.Join) -> list[str]:
    parts = [] if join.value is None else [_join_value(join.value)]
    if join.context is not None:
        context = join.context
        parts.append("stitch(sum)" if context.kind == "stitch" and context.positions == "sum" else context.kind)
    return parts


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of the language")
    return name


def _callee(name: str) -> str:
    if name in EXAMPLES or name == "plan":
        raise ValueError(f"`{name}` is a statement, and no function or plan can have its name")
    return _name(name)


def _function(name: str) -> str:
    # `text(2000)` is also the bound of a parameter.
    return name if name == "text" else _callee(name)


def _expr(value: ast.Expr, least: int = 0) -> str:
    """`value` on one line, in brackets if it binds less tightly than `least`."""
    match value:
        case ast.Name(name):
            if name in ("true", "false"):
                raise ValueError(f"`{name}` is a value and no name")
            return _name(name)
        case ast.Int(number):
            return _bracketed(_digits(str(number)), _UNARY, least)
        case ast.Float(number):
            if not isfinite(number):
                raise ValueError(f"{number} can't be written as a number")
            text = format(Decimal(repr(number)), "f")
            text = _digits(text if "." in text else text + ".0")
            return _bracketed(text, _UNARY, least)
        case ast.Bool(truth):
            return "true" if truth else "false"
        case ast.Str():
            return write_string(value)
        case ast.List(items):
            return f"[{', '.join(_expr(item) for item in items)}]"
        case ast.Unary(op, operand):
            # `-5` is one literal, so the minus of a literal needs brackets to be an operator.
            text = _expr(operand, _UNARY)
            if op == "-" and isinstance(operand, ast.Int | ast.Float) and not text.startswith("-"):
                text = f"({text})"
            return _bracketed(op + text, _UNARY, least)
        case ast.Binary(op, left, right):
            level = _LEVEL[op]
            text = f"{_expr(left, level + (level == _COMPARISON))} {op} {_expr(right, level + 1)}"
            return _bracketed(text, level, least)
        case ast.Field(inner, name):
            return f"{_expr(inner, _POSTFIX)}.{_name(name)}"
        case ast.Index(inner, index):
            return f"{_expr(inner, _POSTFIX)}[{_expr(index)}]"
        case ast.Apply(function, args):
            return f"{_function(function)}({', '.join(_arg(arg).flat() for arg in args)})"
        case _:
            assert_never(value)


def _bracketed(text: str, level: int, least: int) -> str:
    return f"({text})" if level < least else text


def _digits(text: str) -> str:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} characters can't be written")
    return text


def dump_ast(program: ast.Program) -> str:
    """The syntax as an indented tree: a node a line, expressions in prefix form."""
    lines: list[str] = []
    for plan in program.plans:
        lines.append(f"PlanDef {plan.name}")
        for param in plan.params:
            lines.append(f"  Param {param.name}" + (f": {_prefix(param.bound)}" if param.bound else ""))
        lines += [f"  Option {option.name}={_prefix(option.value)}" for option in plan.options]
        _dump_block(plan.body, 1, lines)
    return "\n".join(lines) + "\n"


def _dump_block(block: ast.Block, depth: int, lines: list[str], title: str = "Block") -> None:
    lines.append("  " * depth + title)
    for stmt in block.stmts:
        _dump(stmt, depth + 1, lines)


def _dump(node: ast.Stmt | ast.Branch, depth: int, lines: list[str]) -> None:
    def head(*words: str | None, options: Sequence[ast.Option] = ()) -> None:
        shown = [type(node).__name__, *(word for word in words if word)]
        shown += [f"{option.name}={_prefix(option.value)}" for option in options]
        lines.append("  " * depth + " ".join(shown))

    def join(node: ast.Join | None) -> None:
        if node is not None:
            lines.append("  " * (depth + 1) + " ".join(["Join", *_join_parts(node)]))

    match node:
        case ast.Write(role, value):
            head(role, _prefix(value))
        case ast.Gen(name, prompt, options) | ast.Expand(name, prompt, options):
            head(name, f"prompt={_prefix(prompt)}" if prompt else None, options=options)
        case ast.Fork(name, index, width, options, body, joined):
            head(name, f"index={index}" if index else None, f"width={_prefix(width)}", options=options)
            _dump_block(body, depth + 1, lines)
            join(joined)
        case ast.Branches(name, options, branches, joined):
            head(name, options=options)
            for branch in branches:
                _dump(branch, depth + 1, lines)
            join(joined)
        case ast.Branch(label, prompt, options, body):
            head(label, f"prompt={_prefix(prompt)}" if prompt else None, options=options)
            _dump_block(body, depth + 1, lines)
        case ast.Map(name, index, item, over, options, body, joined):
            head(name, f"index={index}" if index else None, f"item={item}", f"over={_prefix(over)}", options=options)
            _dump_block(body, depth + 1, lines)
            join(joined)
        case ast.Reduce(name, item, over, options, body):
            head(name, f"item={item}", f"over={_prefix(over)}", options=options)
            _dump_block(body, depth + 1, lines)
        case ast.Loop(count, body, until):
            head(f"count={_prefix(count)}", f"until={_prefix(until)}" if until else None)
            _dump_block(body, depth + 1, lines)
        case ast.If(cond, then, orelse):
            head(f"cond={_prefix(cond)}")
            _dump_block(then, depth + 1, lines, "Then")
            if orelse is not None:
                _dump_block(orelse, depth + 1, lines, "Else")
        case ast.Need(cond):
            head(_prefix(cond))
        case ast.Return(value):
            head(_prefix(value))
        case ast.Let(name, value):
            head(name, _prefix(value))
        case ast.Call(name, plan, args, options):
            head(name, f"plan={plan}", *(_prefix_arg(arg) for arg in args), options=options)
        case _:
            assert_never(node)


def _prefix(value: ast.Expr) -> str:
    """An expression with its operator first: `a + 2` as `(+ a 2)`, a string with its parts."""
    match value:
        case ast.Name(name):
            return name
        case ast.Int(number) | ast.Float(number):
            return repr(number)
        case ast.Bool(truth):
            return "true" if truth else "false"
        case ast.Str(()):
            return '""'
        case ast.Str(parts):
            shown = [json.dumps(p, ensure_ascii=False) if isinstance(p, str) else interpolated(p) for p in parts]
            return (
                shown[0] if len(parts) == 1 and isinstance(parts[0], str) else f"(str{''.join(' ' + s for s in shown)})"
            )
        case ast.List(items):
            return f"[{' '.join(_prefix(item) for item in items)}]"
        case ast.Unary(op, operand):
            return f"({op} {_prefix(operand)})"
        case ast.Binary(op, left, right):
            return f"({op} {_prefix(left)} {_prefix(right)})"
        case ast.Field(inner, name):
            return f"(. {_prefix(inner)} {name})"
        case ast.Index(inner, index):
            return f"([] {_prefix(inner)} {_prefix(index)})"
        case ast.Apply(function, args):
            return f"({function}{''.join(' ' + _prefix_arg(arg) for arg in args)})"
        case _:
            assert_never(value)


def _prefix_arg(arg: ast.Arg) -> str:
    return _prefix(arg.value) if arg.name is None else f"{arg.name}={_prefix(arg.value)}"
