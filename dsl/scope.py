"""Names in scope while a plan is checked, and why one that is not in scope is not.

A scope is a dict chained to the one around it, so entering a branch costs nothing however many names are visible.
A *thread* is a plan's body or a branch's: what is bound in it is not seen outside. Inside a thread, an arm of an `if`
and a loop have scopes of their own, since what they bind is seen after them under conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from anabranch.dsl.ast import (
    Block,
    Branches,
    Call,
    Expand,
    Fork,
    Gen,
    If,
    Let,
    Loop,
    Map,
    Need,
    PlanDef,
    Reduce,
    Return,
    Stmt,
    Write,
)
from anabranch.dsl.diagnostics import Diagnostic, Source, Span, did_you_mean
from anabranch.dsl.types import Type

_STATEMENTS = ("text", "user", "system", "assistant", "gen", "fork", "branch", "map", "reduce", "loop", "if", "need")
_OTHERS = ("return", "expand", "plan", "join", "else", "until", "true", "false", "ids", "logprob")
_FUNCTIONS = ("len", "lines", "in", "matches")

RESERVED = frozenset((*_STATEMENTS, *_OTHERS, *_FUNCTIONS))
"""Words that mean something in a plan and so name nothing. `logprob` is what `best(logprob)` reads."""

Step: TypeAlias = tuple[Literal["branch", "arm"], int, int]
"""One way into a statement: which kind of part, the statement's id, and which of its parts."""

MOST_SUGGESTED = 200  # names compared for "did you mean": 100 errors beside 200 long, similar names take a second


@dataclass(slots=True, eq=False)
class Binding:
    """A bound name. `also`: bindings of the same name that a use of this one may read (in the arms of an `if`)."""

    name: str
    type: Type
    span: Span
    used: bool = False
    also: list[Binding] = field(default_factory=list)

    def use(self) -> None:
        """Mark this binding, and those that a use of it may read."""
        waiting = [self]
        while waiting:
            binding = waiting.pop()
            if not binding.used:
                binding.used = True
                waiting.extend(binding.also)


class Scope:
    """A scope within the one around it.

    kind: `thread` for the body of a plan or branch, `arm` of an `if`, `loop`
    path: the parts of statements that lead to it
    """

    __slots__ = ("kind", "names", "parent", "path")

    def __init__(self, parent: Scope | None, kind: Literal["thread", "arm", "loop"], step: Step | None = None) -> None:
        self.parent = parent
        self.kind = kind
        self.names: dict[str, Binding] = {}
        around: tuple[Step, ...] = () if parent is None else parent.path
        self.path: tuple[Step, ...] = around if step is None else (*around, step)

    def lookup(self, name: str) -> Binding | None:
        """What `name` is bound to here, or None."""
        scope: Scope | None = self
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None

    def visible(self) -> Iterator[str]:
        """Every name in scope, the nearest first."""
        scope: Scope | None = self
        while scope is not None:
            yield from scope.names
            scope = scope.parent

    def clash(self, name: str) -> tuple[Literal["twice", "shadow", "rebind"], Binding] | None:
        """What binding `name` here would do to a binding that is already there; None where there is none.

        A loop's body may rebind what its thread bound before the loop; nothing else may be bound again.
        """
        scope: Scope | None = self
        in_loop = in_thread = False
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return ("shadow" if in_thread else "rebind" if in_loop else "twice"), found
            in_loop = in_loop or scope.kind == "loop"
            in_thread = in_thread or scope.kind == "thread"
            scope = scope.parent
        return None


class PlanNames:
    """Every binding of a plan, in scope or not, to explain a name that is not in scope."""

    def __init__(self, plan: PlanDef, source: Source) -> None:
        self._source = source
        self._bound: dict[str, list[tuple[tuple[Step, ...], Span]]] = {}
        self._labels: dict[str, str | None] = {}
        self._walk(plan.body, ())

    def explain(self, name: str, scope: Scope, span: Span, others: frozenset[str]) -> Diagnostic:
        """Why `name` is not in scope at `span`. `others`: plans and functions, which are no values."""
        best: tuple[int, tuple[Step, ...], Span] | None = None
        for path, where in self._bound.get(name, ()):
            rank = _rank(path, scope.path)
            if best is None or rank < best[0]:
                best = rank, path, where
        if best is not None:
            return self._misplaced(name, best[0], best[2], span)
        if name in self._labels:
            fork = self._labels[name]
            return Diagnostic(
                "undefined-name",
                f"`{name}` is the label of a branch, which binds nothing",
                span,
                help=f"read it from the fork's value: `{fork or 'x'}.{name}`"
                + ("" if fork else " with `x = fork() ...`"),
            )
        if name in others:
            return Diagnostic("undefined-name", f"`{name}` is no value", span, help=f"call it: `x = {name}(...);`")
        known = []
        for seen in scope.visible():
            known.append(seen)
            if len(known) >= MOST_SUGGESTED:
                break
        return Diagnostic("undefined-name", f"`{name}` is not bound", span, help=did_you_mean(name, known))

    def _misplaced(self, name: str, rank: int, where: Span, span: Span) -> Diagnostic:
        line = f" at line {self._source.position(where.start)[0]}" if where.end and self._source.text else ""
        if rank == 0:
            return Diagnostic(
                "maybe-unbound",
                f"`{name}` is not bound on every path",
                span,
                f"bound{line}, in some arm of an `if` alone",
                f"bind `{name}` in every arm, `else` included, or before the `if`",
            )
        if rank == 1:
            return Diagnostic(
                "sibling-name",
                f"`{name}` is bound in a sibling branch",
                span,
                f"bound{line}",
                "branches run side by side and do not see each other: bind it before the fork, or join first",
            )
        if rank == 2:
            return Diagnostic(
                "leaked-name",
                f"`{name}` is bound inside a branch and is not visible here",
                span,
                f"bound{line}",
                f"`return({name});` in the branch, and read the value of the join",
            )
        return Diagnostic(
            "used-before-bound",
            f"`{name}` is used before it is bound",
            span,
            f"bound{line}",
            f"move the statement that binds `{name}` up",
        )

    def _walk(self, block: Block, path: tuple[Step, ...]) -> None:
        for stmt in block.stmts:
            name = bound_name(stmt)
            match stmt:
                case Fork(index=index, body=body):
                    inner: tuple[Step, ...] = (*path, ("branch", id(stmt), 0))
                    self._add(index, inner, stmt)
                    self._walk(body, inner)
                case Map(index=index, item=item, body=body):
                    inner = (*path, ("branch", id(stmt), 0))
                    self._add(index, inner, stmt)
                    self._add(item, inner, stmt)
                    self._walk(body, inner)
                case Reduce(item=item, body=body):
                    inner = (*path, ("branch", id(stmt), 0))
                    self._add(item, inner, stmt)
                    self._walk(body, inner)
                case Branches(branches=branches):
                    for i, branch in enumerate(branches):
                        if branch.label is not None:
                            self._labels.setdefault(branch.label, name)
                        self._walk(branch.body, (*path, ("branch", id(stmt), i)))
                case If(then=then, orelse=orelse):
                    self._walk(then, (*path, ("arm", id(stmt), 0)))
                    if orelse is not None:
                        self._walk(orelse, (*path, ("arm", id(stmt), 1)))
                case Loop(body=body):
                    self._walk(body, path)
                case _:
                    pass
            self._add(name, path, stmt)

    def _add(self, name: str | None, path: tuple[Step, ...], stmt: Stmt) -> None:
        if name is not None:
            self._bound.setdefault(name, []).append((path, stmt.span))


def bound_name(stmt: Stmt) -> str | None:
    """The name that the statement binds in its own scope."""
    match stmt:
        case Gen() | Fork() | Branches() | Map() | Reduce() | Call() | Expand() | Let():
            return stmt.name
        case Write() | Loop() | If() | Need() | Return():
            return None


def _rank(bound: tuple[Step, ...], here: tuple[Step, ...]) -> int:
    """How a binding lies to a use: 0 in an arm, 1 in a sibling, 2 in another branch, 3 in the same scope, later."""
    same = 0
    while same < min(len(bound), len(here)) and bound[same] == here[same]:
        same += 1
    rest = bound[same:]
    if not rest:
        return 3
    kind, stmt, _ = rest[0]
    if kind == "branch":
        return 1 if same < len(here) and here[same][1] == stmt else 2
    return 0 if all(step[0] == "arm" for step in rest) else 2
