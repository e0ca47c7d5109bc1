"""Mutants of the code, drawn by machine: one node of a function's syntax tree changed, and its code put in its place.

mutmut and its like start a whole test run for each mutant, which takes minutes here. These are made inside a process
that has the model loaded and its plans compiled, in a forked child each (see `run`), and take about a second.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PLAN = ("_Slots.add", "_Slots.extend", "StepAttention._extend", "StepAttention._plan", "StepAttention._plan_own")
SCOPE: dict[str, tuple[str, ...]] = {
    "compiler.scheduler": ("Policy.*", "Thread.__init__", "Fork.*", "Scheduler.*", "_still_waits"),
    "runtime.pages": ("PagePool.*", "Segment.*", "View.*", "PrefixCache.*", "KvStore.save", "KvStore.restore"),
    "runtime.context": ("Context.*",),
    "runtime.joins": ("JoinState.*",),
    "runtime.attention": (*_PLAN, "_link_slots"),
    "runtime.tasks": (
        "Task._ready_to_stitch", "Task._run_branches", "Task._join", "Task._stitch", "Task.num_pages",
        "Task.drop_finished",
    ),
    "runtime.engine": (
        "Engine._child_task", "Engine._make_child", "Engine._make_room", "Engine._num_free", "Engine._pages_for",
        "Engine._portions", "Engine._preempt", "Engine._bring_back", "Engine._match_prefix", "Engine.remember",
        "Engine._spawn", "Engine._stopped", "Engine._end", "Engine._soonest", "Engine._close", "Engine._room",
    ),
}  # fmt: skip
"""The functions whose code is mutated, by module: what decides who sees what, who runs, and who owns which page."""


@dataclass(frozen=True)
class CodeMutant:
    """One change. snippet: what stood there; ordinal: among equal changes of equal text in the function."""

    module: str
    function: str
    operator: str
    snippet: str
    ordinal: int
    line: int
    site: int

    @property
    def key(self) -> str:
        """Its name in the list of survivors: it stays while other lines move."""
        return f"{self.module}:{self.function}: {self.operator}: {self.snippet}" + (
            f" #{self.ordinal + 1}" if self.ordinal else ""
        )


def every() -> list[CodeMutant]:
    """All mutants of the functions of `SCOPE`, in order of the source."""
    found: list[CodeMutant] = []
    for module in SCOPE:
        for function, node in _functions(module):
            counted: Counter[tuple[str, str]] = Counter()
            for site, (operator, snippet, line, _) in enumerate(_sites(node)):
                found.append(CodeMutant(module, function, operator, snippet, counted[operator, snippet], line, site))
                counted[operator, snippet] += 1
    return found


def draw(count: int, seed: int) -> list[CodeMutant]:
    """`count` mutants by the hash of their keys: a change of the code elsewhere leaves the choice as it is."""

    def place(mutant: CodeMutant) -> bytes:
        return hashlib.blake2b(f"{seed} {mutant.key}".encode(), digest_size=8).digest()

    return sorted(every(), key=place)[:count]


def install(mutant: CodeMutant) -> None:
    """Change the code of this process."""
    tree = ast.parse(_source(mutant.module))
    ((_, node),) = [found for found in _functions_of(tree, mutant.module) if found[0] == mutant.function]
    sites = list(_sites(node))
    operator, snippet, _, apply = sites[mutant.site]
    if (operator, snippet) != (mutant.operator, mutant.snippet):
        raise ValueError(f"{mutant.key} is not there")
    apply()
    ast.fix_missing_locations(tree)
    whole = compile(tree, f"<{mutant.key}>", "exec", dont_inherit=True)
    code = next(code for code in _codes(whole) if code.co_qualname == mutant.function)
    live_function(mutant.module, mutant.function).__code__ = code


def live_function(module: str, function: str) -> types.FunctionType:
    """The function object that the rest of the code calls."""
    found: Any = importlib.import_module(f"anabranch.{module}")
    *outer, name = function.split(".")
    for part in outer:
        found = getattr(found, part)
    found = found.__dict__[name]
    if isinstance(found, property):
        found = found.fget
    if not isinstance(found, types.FunctionType):
        raise TypeError(f"{function} of {module} is no function")
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


@cache
def _source(module: str) -> str:
    found = importlib.import_module(f"anabranch.{module}")
    assert found.__file__ is not None
    return Path(found.__file__).read_text(encoding="utf-8")


def _functions(module: str) -> Sequence[tuple[str, ast.FunctionDef]]:
    return _functions_of(ast.parse(_source(module)), module)


def _functions_of(tree: ast.Module, module: str) -> list[tuple[str, ast.FunctionDef]]:
    wanted = SCOPE[module]
    found: list[tuple[str, ast.FunctionDef]] = []
    for outer in tree.body:
        if isinstance(outer, ast.FunctionDef) and outer.name in wanted:
            found.append((outer.name, outer))
        if isinstance(outer, ast.ClassDef):
            for inner in outer.body:
                name = f"{outer.name}.{inner.name}" if isinstance(inner, ast.FunctionDef) else ""
                if isinstance(inner, ast.FunctionDef) and (name in wanted or f"{outer.name}.*" in wanted):
                    found.append((name, inner))
    missing = {name for name in wanted if not name.endswith("*")} - {name for name, _ in found}
    if missing:
        raise ValueError(f"{module} has no {sorted(missing)}")
    return found


# --- the operators

Site = tuple[str, str, int, Callable[[], None]]
"""(operator, the text that it changes, line, what changes the tree)"""

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
_PAIRS = {"min": "max", "max": "min", "any": "all", "all": "any", "popleft": "pop", "appendleft": "append"}


def _sites(function: ast.FunctionDef) -> Iterator[Site]:
    """Every change of the function's body, in order. What only words a message is left alone."""
    for statement in function.body:
        yield from _of(statement)
    yield from _deletions(function)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else text[:87] + "..."


def _of(node: ast.AST) -> Iterator[Site]:
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.arguments | ast.AnnAssign):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            yield from _of(node.value)
        return
    line = getattr(node, "lineno", 0)
    for operator, apply in _changes(node):
        # A condition stands for the whole statement that it governs.
        shown = getattr(node, "test", node) if operator == "condition negated" else node
        yield operator, _text(shown), line, apply
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "ctx"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _of(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                yield f"compare {type(op).__name__}", _setter(ops, place, _COMPARE[type(op)]())
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            yield f"arithmetic {type(op).__name__}", _attribute(node, "op", _ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield "and/or", _attribute(node, "op", ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield "unary dropped", _become(node, ast.IfExp(ast.Constant(True), node.operand, ast.Constant(None)))
        case ast.Constant(value=bool() as value):
            yield "constant negated", _attribute(node, "value", not value)
        case ast.Constant(value=int() as value):
            yield "constant + 1", _attribute(node, "value", value + 1)
            yield "constant - 1", _attribute(node, "value", value - 1)
        case ast.Break():
            yield "break/continue", _become(node, ast.Continue())
        case ast.Continue():
            yield "break/continue", _become(node, ast.Break())
        case ast.Call(func=func, args=args):
            if isinstance(func, ast.Name) and func.id in _PAIRS:
                yield f"{func.id}/{_PAIRS[func.id]}", _attribute(func, "id", _PAIRS[func.id])
            if isinstance(func, ast.Attribute) and func.attr in _PAIRS:
                yield f"{func.attr}/{_PAIRS[func.attr]}", _attribute(func, "attr", _PAIRS[func.attr])
            symmetric = isinstance(func, ast.Name) and func.id in ("min", "max")
            if len(args) >= 2 and not symmetric and not any(isinstance(arg, ast.Starred) for arg in args):
                yield "arguments swapped", _setter(args, slice(0, 2), [args[1], args[0]])
        case _:
            pass
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition negated", _attribute(node, "test", ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=ifs):
            for place, test in enumerate(ifs):
                yield "condition negated", _setter(ifs, place, ast.UnaryOp(ast.Not(), test))
        case _:
            pass


def _deletions(node: ast.AST) -> Iterator[Site]:
    """Statements that can go without leaving a name unbound."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if not isinstance(block, list):
            continue
        for place, statement in enumerate(block):
            if not isinstance(statement, ast.stmt):
                continue
            if _may_go(statement):
                yield "deleted", _text(statement), statement.lineno, _setter(block, place, ast.Pass())
            yield from _deletions(statement)
    for case in getattr(node, "cases", []):
        yield from _deletions(case)


def _may_go(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Constant()):
            return False
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Raise() | ast.Return() | ast.Break() | ast.Continue():
            return True
        case ast.Assign(targets=[target]):
            return isinstance(target, ast.Attribute | ast.Subscript)
        case _:
            return False


def _setter(items: list[Any], place: int | slice, value: Any) -> Callable[[], None]:
    return lambda: items.__setitem__(place, value)


def _attribute(node: ast.AST, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _become(node: ast.AST, other: ast.AST) -> Callable[[], None]:
    """`node` itself turns into `other`: its parent need not be known."""

    def apply() -> None:
        values = dict(ast.iter_fields(other))
        node.__class__ = other.__class__
        for name in [
            name for name in vars(node) if name not in ("lineno", "col_offset", "end_lineno", "end_col_offset")
        ]:
            delattr(node, name)
        for name, value in values.items():
            setattr(node, name, value)

    return apply
