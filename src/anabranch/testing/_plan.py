"""A plan to test with: its program, its inputs, and the host functions that it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from anabranch.dsl import ast

if TYPE_CHECKING:
    from anabranch.compiler.pipeline import Compiled
    from anabranch.dsl.spec import Value


@dataclass(frozen=True)
class Plan:
    """A plan file (its last plan is the one to run), with inputs and host functions for it.

    program: the syntax tree of the file
    inputs: a value for each parameter
    functions: the host functions that it calls, by name; pure, so that a run can be repeated
    """

    program: ast.Program
    inputs: Mapping[str, Value] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        text: str,
        inputs: Mapping[str, Value] | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Plan:
        """The plan that `text` holds. Raises PlanError if it cannot be read."""
        from anabranch.dsl.parse import parse_text

        return cls(parse_text(text), inputs or {}, functions or {})

    @cached_property
    def text(self) -> str:
        """The plan file, in its canonical form."""
        from anabranch.dsl.printer import print_plan

        return print_plan(self.program)

    @cached_property
    def compiled(self) -> Compiled:
        """The plan, compiled for a model whose context begins with a start token. Raises PlanError."""
        from anabranch.compiler.pipeline import compile_plan

        return compile_plan(self.program, functions=tuple(self.functions), start_token=True)

    @cached_property
    def stitches_several(self) -> bool:
        """Whether a join, if it is met, takes the segments of several branches into the parent's view."""
        return any(_stitches_several(stmt) for stmt in _statements(self.program) if isinstance(stmt, _FORKS))

    @cached_property
    def nests_forks(self) -> bool:
        """Whether a fork or map stands in a branch of another."""
        return any(
            isinstance(inner, _FORKS)
            for stmt in _statements(self.program)
            if isinstance(stmt, _FORKS)
            for body in _bodies(stmt)
            for inner in _walk(body)
        )

    @cached_property
    def may_fail(self) -> bool:
        """Whether something in it can fail a branch or cancel one."""
        return any(_may_fail(stmt) for stmt in _statements(self.program))

    @cached_property
    def has_deadline(self) -> bool:
        """Whether wall-clock time decides something; such a plan does not run deterministically."""
        return any(
            option.name == "deadline" for stmt in _statements(self.program) for option in getattr(stmt, "options", ())
        )

    def __repr__(self) -> str:
        inputs = f"inputs = {dict(self.inputs)!r}\n" if self.inputs else ""
        functions = f"functions = {', '.join(self.functions)}\n" if self.functions else ""
        return inputs + functions + self.text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows a failing example."""
        lines = repr(self).rstrip("\n").split("\n")
        with printer.group(4, "Plan(", ")"):
            for line in lines:
                printer.break_()
                printer.text(line)


_FORKS = (ast.Fork, ast.Branches, ast.Map)


def _statements(program: ast.Program) -> Iterator[ast.Stmt]:
    for plan in program.plans:
        yield from _walk(plan.body)


def _walk(block: ast.Block) -> Iterator[ast.Stmt]:
    for stmt in block.stmts:
        yield stmt
        for body in _bodies(stmt):
            yield from _walk(body)


def _bodies(stmt: ast.Stmt) -> tuple[ast.Block, ...]:
    match stmt:
        case ast.Fork(body=body) | ast.Map(body=body) | ast.Reduce(body=body) | ast.Loop(body=body):
            return (body,)
        case ast.Branches(branches=branches):
            return tuple(branch.body for branch in branches)
        case ast.If(then=then, orelse=orelse):
            return (then,) if orelse is None else (then, orelse)
        case _:
            return ()


def _width(stmt: ast.Stmt) -> int:
    match stmt:
        case ast.Fork(width=ast.Int(value=width)):
            return width
        case ast.Branches(branches=branches):
            return len(branches)
        case _:
            return 2  # known at run time alone


def _stitches_several(stmt: ast.Fork | ast.Branches | ast.Map) -> bool:
    join = stmt.join
    if join is None or join.context is None or join.context.kind != "stitch" or _width(stmt) < 2:
        return False
    value = join.value
    if value is None or value.kind == "all":
        return True
    return value.kind == "first" and value.count != ast.Int(1)


def _may_fail(stmt: ast.Stmt) -> bool:
    match stmt:
        case ast.Need():
            return True
        case (
            ast.Fork(join=ast.Join(value=value))
            | ast.Branches(join=ast.Join(value=value))
            | ast.Map(join=ast.Join(value=value))
        ):
            return value is not None and value.kind in ("first", "quorum")
        case _:
            return False
