"""Syntax to text: canonical plan text, formatted source with its comments, and a tree for the eye."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
        args = [_param(param) for param in plan.params] + _options(plan.options)
        self._line(0, _group(f"{_name(plan.name)} = plan", args, " {", 0))
        self._block(plan.body, 0)
        self.lines[-1] += "}"
        self._beside(plan.span.start)

    def branch(self, branch: ast.Branch, indent: int) -> None:
        args = [*_optional(branch.prompt, indent), *_options(branch.options, indent)]
        self._line(indent, _group(_bound(branch.label) + "branch", args, " {", indent))
        self._block(branch.body, indent)
        self.lines[-1] += "};"
        self._beside(branch.span.start)

    def statement(self, stmt: ast.Stmt, indent: int) -> None:
        match stmt:
            case ast.Write(role, value):
                self._line(indent, _group(role, [_item(value, indent)], ";", indent))
            case ast.Need(cond):
                self._line(indent, _group("need", [_item(cond, indent)], ";", indent))
            case ast.Return(value):
                self._line(indent, _group("return", [_item(value, indent)], ";", indent))
            case ast.Gen(name, prompt, options):
                args = [*_optional(prompt, indent), *_options(options, indent)]
                self._line(indent, _group(_bound(name) + "gen", args, ";", indent))
            case ast.Expand(name, prompt, options):
                args = [*_optional(prompt, indent), *_options(options, indent)]
                self._line(indent, _group(_bound(name) + "expand", args, ";", indent))
            case ast.Call(name, plan, call_args, options):
                args = [_arg(arg, indent + _STEP) for arg in call_args] + _options(options, indent)
                self._line(indent, _group(_bound(name) + _callee(plan), args, ";", indent))
            case ast.Let(name, value):
                if isinstance(value, ast.Apply):
                    args = [_arg(arg, indent + _STEP) for arg in value.args]
                    self._line(indent, _group(_bound(name) + _callee(value.function), args, ";", indent))
                else:
                    self._line(indent, _bound(name) + _wrapped(value, indent, len(name) + 4) + ";")
            case ast.Fork(name, index, width, options, body, join):
                binder = f"{_name(index)}: " if index is not None else ""
                args = [binder + _item(width, indent), *_options(options, indent)]
                self._line(indent, _group(_bound(name) + "fork", args, " {", indent))
                self._block(body, indent)
                self._join(join, indent)
            case ast.Branches(name, options, branches, join):
                self._line(indent, _group(_bound(name) + "fork", _options(options, indent), " {", indent))
                key = braces(stmt, self._text).start if self._text else stmt.span.start
                self._open(key)
                for branch in branches:
                    self._before(branch.span.start, indent + _STEP)
                    self.branch(branch, indent + _STEP)
                self._close(key, indent, empty=False)
                self._join(join, indent)
            case ast.Map(name, index, item, over, options, body, join):
                args = [_name(index)] if index is not None else []
                args += [f"{_name(item)}: {_item(over, indent)}", *_options(options, indent)]
                self._line(indent, _group(_bound(name) + "map", args, " {", indent))
                self._block(body, indent)
                self._join(join, indent)
            case ast.Reduce(name, item, over, options, body):
                args = [f"{_name(item)}: {_item(over, indent)}", *_options(options, indent)]
                self._line(indent, _group(_bound(name) + "reduce", args, " {", indent))
                self._block(body, indent)
                self.lines[-1] += "};"
            case ast.Loop(count, body, until):
                self._line(indent, _group("loop", [_item(count, indent)], " {", indent))
                self._block(body, indent)
                if until is None:
                    self.lines[-1] += "};"
                else:
                    self.lines[-1] += _group("} until", [_item(until, indent)], ";", indent)
            case ast.If(cond, then, orelse):
                self._line(indent, _group("if ", [_item(cond, indent)], " {", indent))
                self._block(then, indent)
                if orelse is not None:
                    self.lines[-1] += "} else {"
                    self._block(orelse, indent)
                self.lines[-1] += "};"
            case _:
                assert_never(stmt)
        self._beside(stmt.span.start)

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
            return
        args = [] if join.value is None else [_join_value(join.value)]
        if join.context is not None:
            context = join.context
            args.append("stitch(sum)" if context.kind == "stitch" and context.positions == "sum" else context.kind)
        self.lines[-1] += _group("} join", args, ";", indent)

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


def _group(head: str, items: Sequence[str], tail: str, indent: int) -> str:
    """`head(items)tail`, on one line if it fits there; a single item is never put on a line of its own."""
    flat = f"{head}({', '.join(items)}){tail}"
    if len(items) < 2 or _fits(flat, indent):
        return flat
    inner = " " * (indent + _STEP)
    return f"{head}(\n" + ",\n".join(inner + item for item in items) + f"\n{' ' * indent}){tail}"


def _fits(text: str, indent: int) -> bool:
    """Whether the line that `text` begins, and the one it ends, are short enough; what is between is a string's."""
    first, _, rest = text.partition("\n")
    return indent + len(first) <= WIDTH and len(rest.rpartition("\n")[2]) <= WIDTH


def _item(value: ast.Expr, indent: int) -> str:
    """An argument of a statement at `indent`; it may come to stand on a line of its own."""
    return _wrapped(value, indent + _STEP, 0)


def _wrapped(value: ast.Expr, indent: int, used: int) -> str:
    """`value` on a line at `indent` of which `used` characters are taken; calls and lists wrap."""
    flat = _expr(value)
    if _fits(flat, indent + used):
        return flat
    match value:
        case ast.Apply(function, args):
            return _group(_function(function), [_arg(arg, indent + _STEP) for arg in args], "", indent)
        case ast.List(items) if len(items) > 1:
            inner = " " * (indent + _STEP)
            lines = ",\n".join(inner + _wrapped(item, indent + _STEP, 0) for item in items)
            return f"[\n{lines}\n{' ' * indent}]"
        case _:
            return flat


def _optional(value: ast.Expr | None, indent: int) -> list[str]:
    return [] if value is None else [_item(value, indent)]


def _options(options: Sequence[ast.Option], indent: int = 0) -> list[str]:
    return [f"{_name(o.name)}={_wrapped(o.value, indent + _STEP, len(o.name) + 1)}" for o in options]


def _arg(arg: ast.Arg, indent: int) -> str:
    if arg.name is None:
        return _wrapped(arg.value, indent, 0)
    return f"{_name(arg.name)}={_wrapped(arg.value, indent, len(arg.name) + 1)}"


def _param(param: ast.Param) -> str:
    return _name(param.name) if param.bound is None else f"{_name(param.name)}: {_expr(param.bound)}"


def _join_value(value: ast.JoinValue) -> str:
    args = [_expr(value.count)] if value.count is not None and value.kind != "all" else []
    if value.count is not None and value.kind == "all":
        args.append(f"min={_expr(value.count)}")
    if value.key is not None:
        args.append(_name(value.key))
    if value.by is not None:
        args.append(f"by={value.by}")
    return f"{value.kind}({', '.join(args)})" if args else value.kind


def _bound(name: str | None) -> str:
    return "" if name is None else f"{_name(name)} = "


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
            literal = op == "-" and isinstance(operand, ast.Int | ast.Float)
            return _bracketed(op + _expr(operand, _POSTFIX if literal else _UNARY), _UNARY, least)
        case ast.Binary(op, left, right):
            level = _LEVEL[op]
            text = f"{_expr(left, level + (level == _COMPARISON))} {op} {_expr(right, level + 1)}"
            return _bracketed(text, level, least)
        case ast.Field(inner, name):
            return f"{_expr(inner, _POSTFIX)}.{_name(name)}"
        case ast.Index(inner, index):
            return f"{_expr(inner, _POSTFIX)}[{_expr(index)}]"
        case ast.Apply(function, args):
            return f"{_function(function)}({', '.join(_arg_flat(arg) for arg in args)})"
        case _:
            assert_never(value)


def _arg_flat(arg: ast.Arg) -> str:
    return _expr(arg.value) if arg.name is None else f"{_name(arg.name)}={_expr(arg.value)}"


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
            parts = [] if node.value is None else [_join_value(node.value)]
            if node.context is not None:
                context = node.context
                parts.append(f"{context.kind}({context.positions})" if context.kind == "stitch" else context.kind)
            lines.append("  " * (depth + 1) + " ".join(["Join", *parts]))

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
