"""From a plan back to the text that it replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Span
from anabranch.dsl.dialects.literals import NotText, Value, text_of

_MAX_CALLS: Final = 64
"""How deep calls may nest: deeper than the threads of any trace."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a plan does, in the order of its text. kind, text: what it is; span: where, in no comparison"""

    kind: str
    text: str
    span: Span = field(compare=False)


def steps_of(program: ast.Program, plan: ast.PlanDef) -> list[Step]:
    """What `plan` does, with all that it calls. Turns of a chat before anything else are left out.

    Raises PlanError `not-a-trace` for a statement that no trace becomes.
    """
    walk = _Walk(program)
    walk.plan(plan)
    return walk.steps


def written(steps: Sequence[Step]) -> str:
    """The text of `steps`: what was written, thread after thread."""
    return "".join(step.text for step in steps if step.kind in ("text", "gen"))


class _Walk:
    def __init__(self, program: ast.Program) -> None:
        self._program = program
        self._plans = {plan.name: plan for plan in program.plans}
        self._called: list[str] = []
        self._seen: set[str] = set()
        self.steps: list[Step] = []

    def plan(self, plan: ast.PlanDef) -> Value:
        """What the plan returns; "" where it returns nothing."""
        self._seen.add(plan.name)
        self._called.append(plan.name)
        value = self._block(plan.body)
        self._called.pop()
        return value

    def _block(self, block: ast.Block) -> Value:
        names: dict[str, Value] = {}
        value: Value = ""
        for stmt in block.stmts:
            match stmt:
                case ast.Write("text", said):
                    self._step("text", self._text(said, names), stmt.span)
                case ast.Write() if not self.steps:
                    pass  # the question that the trace answers
                case ast.Gen(name, None, options):
                    recorded = [option.value for option in options if option.name == "recorded"]
                    if not recorded:
                        self._refuse("this `gen` draws its text, and has none recorded", stmt.span)
                    text = self._text(recorded[0], names)
                    self._step("gen", text, stmt.span)
                    if name is not None:
                        names[name] = text
                case ast.Branches(name):
                    returned = self._fork(stmt)
                    if name is not None:
                        names[name] = returned
                case ast.Call(name, plan):
                    if plan in self._seen or len(self._called) > _MAX_CALLS:
                        self._refuse(f"`{plan}` is called for the second time, or too deep", stmt.span)
                    self._step("call", "", stmt.span)
                    got = self.plan(self._plans[plan])
                    self._step("end", "", stmt.span)
                    if name is not None:
                        names[name] = got
                case ast.Let(name, said):
                    names[name] = self._text(said, names)
                case ast.Return(ast.Name(name)) if isinstance(names.get(name), list):
                    value = names[name]
                case ast.Return(said):
                    value = self._text(said, names)
                case _:
                    self._refuse("no trace becomes such a statement", stmt.span)
        return value

    def _fork(self, fork: ast.Branches) -> list[str]:
        join = fork.join or ast.Join()
        value, context = join.value or ast.JoinValue("all"), join.context or ast.JoinContext("drop")
        fresh = any(option.name == "fresh" and option.value == ast.Bool(True) for option in fork.options)
        kind = f"{value.kind} {context.kind} {context.positions}{' fresh' if fresh else ''}"
        self._step("fork", kind, fork.span)
        returned = []
        for branch in fork.branches:
            if branch.prompt is not None:
                self._refuse("no trace becomes a branch with a prompt", branch.span)
            self._step("branch", "", branch.span)
            got = self._block(branch.body)
            returned.append(got if isinstance(got, str) else "")
            self._step("end", "", branch.span)
        self._step("end", "", fork.span)
        return returned

    def _step(self, kind: str, text: str, span: Span) -> None:
        self.steps.append(Step(kind, text, span))

    def _text(self, expr: ast.Expr, names: dict[str, Value]) -> str:
        try:
            return text_of(expr, names)
        except NotText as error:
            self._refuse(str(error), expr.span)

    def _refuse(self, message: str, span: Span) -> NoReturn:
        raise PlanError(
            Diagnostic("not-a-trace", message, span, help="only a plan that `convert --from` made has a trace"),
            self._program.source,
        )
